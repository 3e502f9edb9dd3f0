// Upsampling by zeros, a FIR filter, downsampling. Polyphase: an output reads only the inputs that lie under its taps, and
// the zeros between them are never there.
//
// A filter that is an outer product is applied to the columns first, which for every output row gives one line of sums as
// long as an input row. Of a filter that is none, the lines are the input rows themselves. What then runs along a line:
//
//     channels   a vector holds channels of one pixel, and a tap is a pixel away: channels_last, and planes, of which as many
//                as a vector has lanes are turned into an image of so many channels
//     positions  a vector holds every down-th pixel of a line, which is therefore kept in `down` phases between margins of
//                zeros; where `up` phases come out, they are interleaved at the end: where channels or planes are too few to
//                fill a vector
//
// Each output is summed by one thread in the order of its taps: the same bits for any number of threads.

template <class Acc> struct Filter {
  int64_t h, w;
  Scratch<Acc> taps; // as they are correlated: (h, w); of a product the factors of the rows (h,), and behind them (w,)
  bool is_product;

  Filter(const UpFirDn2d& a, const void* filter) : h(a.y.taps), w(a.x.taps), taps(h * w + h + w), is_product(a.separable) {
    const Acc* given = static_cast<const Acc*>(filter);
    const double gain = is_product ? __builtin_sqrt(a.gain) : a.gain;
    const int64_t count = is_product ? w : h * w;
    for (int64_t i = 0; i < count; ++i) taps[i] = static_cast<Acc>(given[a.flip ? i : count - 1 - i] * gain);
    if (is_product)
      __builtin_memcpy(&taps[h], &taps[0], w * sizeof(Acc));
    else
      factorise();
  }

  // Makes a product of what is one to rounding.
  void factorise() {
    constexpr double step = sizeof(Acc) == sizeof(float) ? __FLT_EPSILON__ : __DBL_EPSILON__;
    int64_t pivot = 0;
    for (int64_t i = 1; i < h * w; ++i)
      if (__builtin_fabs(taps[i]) > __builtin_fabs(taps[pivot])) pivot = i;
    const int64_t row = pivot / w, column = pivot % w;
    for (int64_t i = 0; i < h; ++i)
      for (int64_t j = 0; j < w; ++j) {
        const double tap = taps[i * w + j];
        const double product = static_cast<double>(taps[i * w + column]) * taps[row * w + j] / taps[pivot];
        if (!(__builtin_fabs(product - tap) <= 4 * step * __builtin_fabs(tap))) return;
      }
    const Scratch<Acc> factors(h + w);
    for (int64_t i = 0; i < h; ++i) factors[i] = taps[i * w + column];
    for (int64_t j = 0; j < w; ++j) factors[h + j] = taps[row * w + j] / taps[pivot];
    __builtin_memcpy(&taps[0], &factors[0], (h + w) * sizeof(Acc));
    is_product = true;
  }
};

// What one output reads of an axis: inputs input, input + 1, …, under taps tap, tap + up, …
struct Window {
  int64_t input, tap, count;
};
struct Windows : Scratch<Window> {
  explicit Windows(const Resampling& a) : Scratch<Window>(a.out) {
    for (int64_t i = 0; i < a.out; ++i) {
      const int64_t start = i * a.down - a.pad, end = start + a.taps;
      const int64_t input = start <= 0 ? 0 : ceil_div(start, a.up);
      const int64_t last = end <= 0 ? 0 : smaller(a.in, ceil_div(end, a.up));
      data[i] = {input, input * a.up - start, larger(0, last - input)};
    }
  }
};

FASTGAN_INLINE int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// An axis' factors without what is common to them: of the outputs o, o + out_phases, …, each reads inputs that are in_phases
// after those of the one before, under the same taps.
struct Phases {
  int64_t in_phases, out_phases;
  explicit Phases(const Resampling& a) {
    int64_t common = a.up, rest = a.down;
    while (rest) {
      const int64_t next = common % rest;
      common = rest;
      rest = next;
    }
    in_phases = a.down / common;
    out_phases = a.up / common;
  }
  // Of output o on a line without ends, which may begin before the image.
  static Window window(const Resampling& a, int64_t o) {
    const int64_t start = o * a.down - a.pad, input = floor_div(start + a.up - 1, a.up), tap = input * a.up - start;
    return {input, tap, tap < a.taps ? (a.taps - 1 - tap) / a.up + 1 : 0};
  }
};

// sums[u] += tap · from[u·lanes]
template <int U, class T> FASTGAN_INLINE void add_tap(vec_t<T> (&sums)[U], acc_t<T> tap, const T* from) {
  for (int u = 0; u < U; ++u) sums[u] += broadcast<acc_t<T>>(tap) * load(from + u * lanes<acc_t<T>>);
}
// The same of taps that are `step` apart and elements that are `stride` apart.
template <int U, class T>
FASTGAN_INLINE void add_taps(vec_t<T> (&sums)[U], const T* from, int64_t stride, const acc_t<T>* taps, int64_t step, int64_t count) {
  for (int64_t j = 0; j < count; ++j) add_tap(sums, taps[j * step], from + j * stride);
}

// Whether the output goes past the caches, which do not hold it beside the input.
template <class T> bool is_streamed(const UpFirDn2d& a) {
  return exceeds_caches<T>(a.N * a.C * (a.y.in * a.x.in + a.y.out * a.x.out));
}

// function(i) for i from First to before Last, where i is known when this is compiled: what it indexes stays in registers.
template <int I> struct Index {
  static constexpr int value = I;
  constexpr operator int() const { return I; }
};
template <int First, int Last, class Function> FASTGAN_INLINE void for_each_of(const Function& function) {
  if constexpr (First < Last) {
    function(Index<First>{});
    for_each_of<First + 1, Last>(function);
  }
}

// ── Channels ─────────────────────────────────────────────────────────────────────────────────────────────────────────

// Calls function(vectors, c) for all of C ≥ lanes channels. The last vector overlaps the one before it.
template <class Acc, class Function> FASTGAN_INLINE void for_channels(int64_t C, const Function& function) {
  constexpr int W = lanes<Acc>, U = FASTGAN_VECTOR_BYTES == 64 ? 4 : 2; // as the registers hold, of which AVX-512 has more
  int64_t c = 0;
  for (; c + U * W <= C; c += U * W) function(Index<U>{}, c);
  for (; c < C; c += W) function(Index<1>{}, smaller(c, C - W));
}

// Where the line of sums need not be kept: the outputs come in groups of out_phases that read the same `count` sums, and
// these stay in registers until the last group has read them.
struct Rolling : Phases {
  int64_t first; // output of the first group, which may begin one before the row
  int64_t input; // that it reads first
  int64_t count; // 0: not so
  int64_t taps[2];

  explicit Rolling(const Resampling& a) : Phases(a), count(0) {
    if (in_phases > 2 || out_phases > 2) return;
    for (first = 0; first > -out_phases; --first) {
      const Window one = window(a, first), other = window(a, first + out_phases - 1);
      if (one.input != other.input || one.count != other.count) continue;
      input = one.input;
      count = one.count;
      taps[0] = one.tap;
      taps[1] = other.tap;
      return;
    }
  }
};

template <class S, class T> struct Channels {
  using Acc = acc_t<S>;
  using Roll = void (Channels::*)(const S*, const Window&, T*) const;

  const UpFirDn2d& a;
  const Filter<Acc>& f;
  int64_t C, width;
  bool streams; // what comes out
  Windows vertical, horizontal;
  Rolling rolling;
  Roll roll = nullptr;

  Channels(const UpFirDn2d& a, const Filter<Acc>& f, int64_t C, bool streams)
      : a(a), f(f), C(C), width(a.x.in * C), streams(streams), vertical(a.y), horizontal(a.x), rolling(a.x) {
    if constexpr (accumulators<T> > 1) {
      const int64_t up = rolling.out_phases, down = rolling.in_phases;
      if (f.is_product) roll = up == 2 ? find_roll<2, 1>() : down == 2 ? find_roll<1, 2>() : find_roll<1, 1>();
    }
  }
  template <int Up, int Down> Roll find_roll() const {
    switch (rolling.count) {
      case 2: return &Channels::roll_along<2, Up, Down>;
      case 3: return &Channels::roll_along<3, Up, Down>;
      case 4: return &Channels::roll_along<4, Up, Down>;
      default: return nullptr;
    }
  }

  int64_t line_size() const { return f.is_product && !roll ? width : 0; }

  // Output row `window`, of which `rows` are the input rows under it.
  void sum_row(const S* rows, const Window& window, T* to, Acc* line) const {
    if (roll) return (this->*roll)(rows, window, to);
    if (f.is_product)
      for_channels<Acc>(width, [&](auto vectors, int64_t i) __attribute__((always_inline)) {
        constexpr int U = decltype(vectors)::value;
        vec_t<S> sums[U] = {};
        add_taps(sums, rows + i, width, &f.taps[window.tap], a.y.up, window.count);
        for (int u = 0; u < U; ++u) store(line + i + u * lanes<Acc>, sums[u]);
      });
    for (int64_t o = 0; o < a.x.out; ++o, to += C) {
      const auto [input, tap, count] = horizontal[o];
      if (f.is_product)
        sum_pixel(line + input * C, 1, &f.taps[f.h + tap], count, to);
      else
        sum_pixel(rows + input * C, window.count, &f.taps[window.tap * f.w + tap], count, to);
    }
  }

  template <class Line> void sum_pixel(const Line* from, int64_t lines, const Acc* taps, int64_t count, T* to) const {
    for_channels<Acc>(C, [&](auto vectors, int64_t c) __attribute__((always_inline)) {
      constexpr int U = decltype(vectors)::value;
      vec_t<S> sums[U] = {};
      for (int64_t i = 0; i < lines; ++i)
        add_taps(sums, from + i * width + c, C, taps + i * a.y.up * f.w, a.x.up, count);
      for (int u = 0; u < U; ++u) store(to + c + u * lanes<Acc>, sums[u]);
    });
  }

  template <int Count, int Up, int Down> void roll_along(const S* rows, const Window& window, T* to) const {
    vec_t<S> taps[Up][Count];
    for (int q = 0; q < Up; ++q)
      for (int j = 0; j < Count; ++j) taps[q][j] = broadcast<Acc>(f.taps[f.h + rolling.taps[q] + j * a.x.up]);
    for_channels<Acc>(C, [&](auto vectors, int64_t c) __attribute__((always_inline)) {
      constexpr int U = decltype(vectors)::value;
      vec_t<S> line[Count][U];
      int64_t x = rolling.input;
      const auto sum_column = [&](auto j) __attribute__((always_inline)) {
        vec_t<S> sums[U] = {};
        if (x >= 0 && x < a.x.in) add_taps(sums, rows + x * C + c, width, &f.taps[window.tap], a.y.up, window.count);
        for (int u = 0; u < U; ++u) line[j.value][u] = sums[u];
        ++x;
      };
      for_each_of<0, Count>(sum_column);
      for (int64_t o = rolling.first;; o += Up) {
        for_each_of<0, Up>([&](auto q) __attribute__((always_inline)) {
          if (o + q.value < 0 || o + q.value >= a.x.out) return;
          vec_t<S> sums[U] = {};
          for_each_of<0, Count>([&](auto j) __attribute__((always_inline)) {
            for (int u = 0; u < U; ++u) sums[u] += taps[q.value][j.value] * line[j.value][u];
          });
          for (int u = 0; u < U; ++u) store_or_stream(to + (o + q.value) * C + c + u * lanes<Acc>, sums[u], streams);
        });
        if (o + Up >= a.x.out) break;
        for_each_of<0, Count - Down>([&](auto j) __attribute__((always_inline)) {
          for (int u = 0; u < U; ++u) line[j.value][u] = line[j.value + Down][u];
        });
        for_each_of<Count - Down, Count>(sum_column);
      }
    });
  }
};

template <class T> void resample_channels(const UpFirDn2d& a, const Filter<acc_t<T>>& f, const T* x, T* y) {
  const Channels<T, T> channels(a, f, a.C, is_streamed<T>(a));
  const int64_t out_width = a.x.out * a.C;
#pragma omp parallel if (a.N * (a.y.in * channels.width + a.y.out * out_width) > parallel_threshold)
  {
    const Scratch<acc_t<T>> line(channels.line_size());
    const Share share(a.N * a.y.out);
    for (int64_t o = share.first; o < share.last; ++o) {
      const Window window = channels.vertical[o % a.y.out];
      channels.sum_row(x + (o / a.y.out * a.y.in + window.input) * channels.width, window, y + o * out_width, line.data);
    }
    finish_streams();
  }
}

// Elements 0, 1, … of each of `planes` planes, which lie `stride` apart, become the channels of pixels with C, and back.
template <class T> void turn_planes(const T* from, int64_t planes, int64_t stride, int64_t pixels, int64_t C, acc_t<T>* to) {
  constexpr int W = lanes<acc_t<T>>;
  for (int64_t c = 0; c < C; c += W)
    for (int64_t i = 0; i < pixels; i += W)
      transpose_tile<acc_t<T>>(
          static_cast<int>(smaller(W, planes - c)), static_cast<int>(smaller(W, pixels - i)),
          [&](int p, int n) __attribute__((always_inline)) { return load(from + (c + p) * stride + i, n); },
          [&](int j, vec_t<T> v, int) __attribute__((always_inline)) { store(to + (i + j) * C + c, v); });
}
template <class T> void turn_back(const acc_t<T>* from, int64_t planes, int64_t stride, int64_t pixels, int64_t C, T* to) {
  constexpr int W = lanes<acc_t<T>>;
  for (int64_t c = 0; c < planes; c += W)
    for (int64_t i = 0; i < pixels; i += W)
      transpose_tile<acc_t<T>>(
          static_cast<int>(smaller(W, pixels - i)), static_cast<int>(smaller(W, planes - c)),
          [&](int j, int) __attribute__((always_inline)) { return load(from + (i + j) * C + c); },
          [&](int p, vec_t<T> v, int n) __attribute__((always_inline)) { store(to + (c + p) * stride + i, v, n); });
}

template <class T> void resample_planes(const UpFirDn2d& a, const Filter<acc_t<T>>& f, const T* x, T* y) {
  using Acc = acc_t<T>;
  constexpr int W = lanes<Acc>;
  constexpr int64_t most_elements = 1 << 15; // of a band of turned rows, and of what comes out: both stay in the L2
  const int64_t planes = a.N * a.C, C = smaller(4, ceil_div(planes, W)) * W;
  const Channels<Acc, Acc> channels(a, f, C, false);
  const int64_t in = a.x.in, out = a.x.out, groups = ceil_div(planes, C);
  const int64_t height = smaller(a.y.out, larger(1, most_elements / C / larger(out, in * a.y.down / a.y.up)));
  const int64_t bands = ceil_div(a.y.out, height), most_rows = smaller(a.y.in, (height * a.y.down + a.y.taps) / a.y.up + 2);
#pragma omp parallel if (planes * (a.y.in * in + a.y.out * out) > parallel_threshold)
  {
    const Scratch<Acc> turned(most_rows * in * C), sums(height * out * C), line(channels.line_size());
    const Share share(groups * bands);
    for (int64_t i = share.first; i < share.last; ++i) {
      const int64_t plane = i / bands * C, count = smaller(C, planes - plane);
      const int64_t first = i % bands * height, last = smaller(first + height, a.y.out);
      const Window& bottom = channels.vertical[last - 1];
      const int64_t top = smaller(a.y.in, channels.vertical[first].input);
      const int64_t rows = smaller(a.y.in, bottom.input + bottom.count) - top;
      turn_planes(x + (plane * a.y.in + top) * in, count, a.y.in * in, rows * in, C, turned.data);
      for (int64_t o = first; o < last; ++o) {
        const Window& window = channels.vertical[o];
        channels.sum_row(turned.data + (window.input - top) * channels.width, window, &sums[(o - first) * out * C], line.data);
      }
      turn_back(sums.data, count, a.y.out * out, (last - first) * out, C, y + (plane * a.y.out + first) * out);
    }
  }
}

// ── Positions ────────────────────────────────────────────────────────────────────────────────────────────────────────

// to[k·to_stride + c] = from[k·from_stride + c], k < pixels, c < C
template <class Acc>
FASTGAN_INLINE void copy_pixels(const Acc* from, int64_t from_stride, Acc* to, int64_t to_stride, int64_t pixels, int64_t C) {
  const auto copy = [&](auto channels) __attribute__((always_inline)) {
    for (int64_t k = 0; k < pixels; ++k)
      for (int64_t c = 0; c < channels; ++c) to[k * to_stride + c] = from[k * from_stride + c];
  };
  switch (C) { // where a loop takes longer than what it does
    case 1: return copy(Index<1>{});
    case 2: return copy(Index<2>{});
    case 3: return copy(Index<3>{});
    case 4: return copy(Index<4>{});
    default: return copy(C);
  }
}

// Outputs r, r + out_phases, … of a row are sums over taps of vectors of a line, which lies in its in_phases phases so that
// these vectors do not skip any pixel.
struct Across : Phases {
  struct Tap {
    int64_t at, index; // where the line is read, and which tap of the axis it is
  };
  int64_t C, out;         // elements of a pixel; pixels of an output phase
  int64_t before, length; // elements of one phase of a line: zeros in front, and all
  Scratch<Tap> taps;      // (out_phases, taps), of which `counts` are read
  Scratch<int64_t> counts;

  Across(const Resampling& a, int64_t C, int64_t W)
      : Phases(a), C(C), out(ceil_div(a.out, out_phases)), taps(out_phases * a.taps), counts(out_phases) {
    int64_t lowest = 0, highest = ceil_div(a.in, in_phases);
    for (int64_t r = 0; r < out_phases; ++r) {
      const auto [input, tap, count] = window(a, r);
      counts[r] = count;
      lowest = smaller(lowest, floor_div(input, in_phases));
      highest = larger(highest, floor_div(input + count, in_phases) + 1 + out);
    }
    before = ceil_div(-lowest * C, W) * W; // whole vectors, so that a tap in the middle reads aligned ones
    length = before + (ceil_div(highest * C, W) + 4) * W;
    for (int64_t r = 0; r < out_phases; ++r)
      for (int64_t j = 0; j < counts[r]; ++j) {
        const int64_t input = window(a, r).input + j, pixel = floor_div(input, in_phases), phase = input - pixel * in_phases;
        taps[r * a.taps + j] = {phase * length + before + pixel * C, window(a, r).tap + j * a.up};
      }
  }
};

// Σ taps[j·step] · rows[j·row + i] for i < n, and zero up to three vectors more, as a line in its phases; `whole` holds it
// before it is split into these.
template <class T>
FASTGAN_INLINE void sum_rows(const T* rows, int64_t row, int64_t n, const acc_t<T>* taps, int64_t step, int64_t count,
                             const T* end, const Across& across, acc_t<T>* line, acc_t<T>* whole) {
  using Acc = acc_t<T>;
  constexpr int W = lanes<Acc>;
  Acc* const to = line + across.before;
  const bool are_pairs = across.in_phases == 2 && across.C == 1;
  for (int64_t i = 0; i < n; i += 4 * W) {
    vec_t<T> sums[4] = {};
    if (i + 4 * W <= n)
      add_taps(sums, rows + i, row, taps, step, count);
    else
      for (int u = 0; u < 4 && i + u * W < n; ++u)
        for (int64_t j = 0; j < count; ++j)
          sums[u] += broadcast<Acc>(taps[j * step]) * load_within(rows + j * row + i + u * W, n - i - u * W, end);
    if (are_pairs)
      for (int u = 0; u < 2; ++u) {
        const Pair<Acc> pair = deinterleave<Acc>({sums[2 * u], sums[2 * u + 1]});
        store(to + i / 2 + u * W, pair.a);
        store(to + across.length + i / 2 + u * W, pair.b);
      }
    else
      for (int u = 0; u < 4; ++u) store((across.in_phases == 1 ? to : whole) + i + u * W, sums[u]);
  }
  if (across.in_phases == 1 || are_pairs) return;
  const int64_t C = across.C, phases = across.in_phases;
  for (int64_t d = 0; d < phases; ++d)
    copy_pixels(whole + d * C, phases * C, to + d * across.length, C, ceil_div(n / C - d, phases), C);
}

// Where a whole vector may be stored: what is wrong behind the n elements is written later.
template <class T> FASTGAN_INLINE void store_before(T* p, vec_t<T> v, int64_t n, const T* limit, bool streams) {
  constexpr int W = lanes<acc_t<T>>;
  if (n >= W || p + W <= limit)
    store_or_stream(p, v, streams);
  else
    store_part(p, v, static_cast<int>(n));
}

// `images` of pixels with C elements each.
template <class T>
void resample_positions(const UpFirDn2d& a, const Filter<acc_t<T>>& f, int64_t images, int64_t C, const T* x, T* y) {
  using Acc = acc_t<T>;
  constexpr int W = lanes<Acc>;
  const int64_t in = a.x.in * C, out = a.x.out * C;
  const T* const end = x + images * a.y.in * in;
  const Windows vertical(a.y);
  const Across across(a.x, C, W);
  const int64_t size = across.in_phases * across.length;
  const int64_t of_phase = across.out * C, sums_size = ceil_div(of_phase, W) * W;
  const bool are_pairs = across.out_phases == 2 && C == 1, streams = is_streamed<T>(a);
  // Several lines at a time: one that is read as soon as it is written is read when the writes have left the store buffer.
  constexpr int64_t ahead = 2048;
  const int64_t lines = f.is_product ? larger(1, ahead / size) : (f.h - 1) / a.y.up + 1;
  const Acc one = 1;
#pragma omp parallel if (images * (a.y.in * in + a.y.out * out) > parallel_threshold)
  {
    const Share share(images * a.y.out);
    T* const limit = y + share.last * out;
    const Scratch<Acc> line(lines * size), whole(in + 4 * W);
    const Scratch<Acc> phases(across.out_phases * sums_size), row(across.out_phases * of_phase + W);
    const Scratch<int64_t> held(lines); // which row of x a line is
    __builtin_memset(line.data, 0, lines * size * sizeof(Acc));
    for (int64_t i = 0; i < lines; ++i) held[i] = -1;
    const auto fill = [&](int64_t i, int64_t row, const Acc* taps, int64_t count) {
      sum_rows(x + row * in, in, in, taps, a.y.up, count, end, across, &line[i * size], whole.data);
    };
    // Writes a row of y; add(totals, tap, e) adds to U vectors of an output phase, from its element e on.
    const auto finish = [&](T* to, const auto& add) __attribute__((always_inline)) {
      const auto phase = [&](auto& totals, int64_t r, int64_t e) __attribute__((always_inline)) {
        for (int64_t j = 0; j < across.counts[r]; ++j) add(totals, across.taps[r * a.x.taps + j], e);
      };
      // U vectors of each phase at a time: so many sums are under way at once.
      const auto write = [&](auto vectors, int64_t e) __attribute__((always_inline)) {
        constexpr int U = decltype(vectors)::value;
        if (across.out_phases == 1) {
          vec_t<T> totals[U] = {};
          phase(totals, 0, e);
          for (int u = 0; u < U && e + u * W < out; ++u) store_before(to + e + u * W, totals[u], out - e - u * W, limit, streams);
        } else if (are_pairs) {
          vec_t<T> even[U] = {}, odd[U] = {};
          phase(even, 0, e);
          phase(odd, 1, e);
          for (int u = 0; u < U; ++u) {
            const Pair<Acc> pair = interleave<Acc>({even[u], odd[u]});
            const int64_t at = 2 * (e + u * W);
            if (at < out) store_before(to + at, pair.a, out - at, limit, streams);
            if (at + W < out) store_before(to + at + W, pair.b, out - at - W, limit, streams);
          }
        } else {
          for (int64_t r = 0; r < across.out_phases; ++r) {
            vec_t<T> totals[U] = {};
            phase(totals, r, e);
            for (int u = 0; u < U; ++u) store(&phases[r * sums_size + e + u * W], totals[u]);
          }
        }
      };
      int64_t e = 0;
      for (; e + 4 * W <= of_phase; e += 4 * W) write(Index<4>{}, e);
      for (; e + 2 * W <= of_phase; e += 2 * W) write(Index<2>{}, e);
      for (; e < of_phase; e += W) write(Index<1>{}, e);
      if (across.out_phases == 1 || are_pairs) return;
      for (int64_t r = 0; r < across.out_phases; ++r)
        copy_pixels(&phases[r * sums_size], C, &row[r * C], across.out_phases * C, across.out, C);
      for (int64_t i = 0; i < out; i += W) store_before(to + i, load(&row[i]), out - i, limit, streams);
    };
    int64_t image = share.first / a.y.out, row_out = share.first % a.y.out;
    if (f.is_product)
      for (int64_t o = share.first; o < share.last; o += lines) {
        const int64_t count = smaller(lines, share.last - o);
        for (int64_t i = 0; i < count; ++i) {
          const Window& down = vertical[row_out];
          fill(i, image * a.y.in + down.input, &f.taps[down.tap], down.count);
          if (++row_out == a.y.out) row_out = 0, ++image;
        }
        for (int64_t i = 0; i < count; ++i)
          finish(y + (o + i) * out, [&](auto& totals, const Across::Tap& tap, int64_t e) __attribute__((always_inline)) {
            add_tap(totals, f.taps[f.h + tap.index], &line[i * size + tap.at + e]);
          });
      }
    else
      for (int64_t o = share.first; o < share.last; ++o) {
        const Window down = vertical[o % a.y.out];
        const int64_t top = o / a.y.out * a.y.in + down.input;
        for (int64_t row = top; row < top + down.count; ++row)
          if (held[row % lines] != row) {
            fill(row % lines, row, &one, 1);
            held[row % lines] = row;
          }
        finish(y + o * out, [&](auto& totals, const Across::Tap& tap, int64_t e) __attribute__((always_inline)) {
          for (int64_t j = 0; j < down.count; ++j)
            add_tap(totals, f.taps[(down.tap + j * a.y.up) * f.w + tap.index], &line[(top + j) % lines * size + tap.at + e]);
        });
      }
    finish_streams();
  }
}

template <class T> void resample(const UpFirDn2d& a, const void* input, const void* filter, void* output) {
  const Filter<acc_t<T>> f(a, filter);
  const T* const x = static_cast<const T*>(input);
  T* const y = static_cast<T*>(output);
  constexpr int64_t wide = 64; // pixels of a row, from which turning planes takes longer than it gains
  if (a.rows ? a.C < lanes<acc_t<T>> : a.x.in >= wide || a.N * a.C < lanes<acc_t<T>>)
    a.rows ? resample_positions(a, f, a.N, a.C, x, y) : resample_positions(a, f, a.N * a.C, 1, x, y);
  else
    a.rows ? resample_channels(a, f, x, y) : resample_planes(a, f, x, y);
}

void upfirdn2d(const UpFirDn2d& a, const void* x, const void* filter, void* y) {
  FASTGAN_BY_DTYPE(resample, (a, x, filter, y), a.dtype)
}
