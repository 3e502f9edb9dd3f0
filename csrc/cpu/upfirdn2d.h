// Upsampling by zeros, a FIR filter, downsampling. Polyphase: an output reads only the inputs that lie under its taps, and
// the zeros between them are never there.
//
// A filter that is an outer product is applied to the columns first, which for every output row gives one line of sums as
// long as an input row. Of a filter that is none, the lines are the input rows themselves. What then runs along a line:
//
//     rows    a vector holds channels, and a tap is a pixel away
//     planes  a vector holds every down-th pixel of a line, which is therefore kept in `down` phases between margins of
//             zeros; where `up` phases come out, they are interleaved at the end
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

// sums[u] += Σ taps[j·step] · from[j·stride + u·lanes], j < count
template <int U, class T>
FASTGAN_INLINE void add_taps(vec_t<T>* sums, const T* from, int64_t stride, const acc_t<T>* taps, int64_t step, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    const vec_t<T> tap = broadcast<acc_t<T>>(taps[j * step]);
    for (int u = 0; u < U; ++u) sums[u] += tap * load(from + j * stride + u * lanes<acc_t<T>>);
  }
}
// The same of the first n elements, where nothing may be read at `end`.
template <class T>
FASTGAN_INLINE void add_taps(vec_t<T>& sum, const T* from, int64_t stride, const acc_t<T>* taps, int64_t step, int64_t count,
                             int64_t n, const T* end) {
  for (int64_t j = 0; j < count; ++j)
    sum += broadcast<acc_t<T>>(taps[j * step]) * load_within(from + j * stride, n, end);
}

// line[i] = Σ taps[j·step] · rows[j·row + i] for i < n, and zero up to three vectors more. Element i of a line in phases is
// element i / phases of phase i % phases, and these are `length` apart.
template <class T>
void sum_rows(const T* rows, int64_t row, int64_t n, const acc_t<T>* taps, int64_t step, int64_t count, const T* end, int phases,
              int64_t length, acc_t<T>* line) {
  using Acc = acc_t<T>;
  constexpr int W = lanes<Acc>;
  for (int64_t i = 0; i < n; i += 4 * W) {
    vec_t<T> sums[4] = {};
    if (i + 4 * W <= n)
      add_taps<4>(sums, rows + i, row, taps, step, count);
    else
      for (int u = 0; u < 4 && i + u * W < n; ++u)
        add_taps(sums[u], rows + i + u * W, row, taps, step, count, n - i - u * W, end);
    if (phases == 1)
      for (int u = 0; u < 4; ++u) store(line + i + u * W, sums[u]);
    else if (phases == 2)
      for (int u = 0; u < 2; ++u) {
        const Pair<Acc> pair = deinterleave<Acc>({sums[2 * u], sums[2 * u + 1]});
        store(line + i / 2 + u * W, pair.a);
        store(line + length + i / 2 + u * W, pair.b);
      }
    else
      for (int64_t k = i; k < smaller(n, i + 4 * W); ++k) line[k % phases * length + k / phases] = sums[(k - i) / W][(k - i) % W];
  }
}

// Where a whole vector may be stored: what is wrong behind the n elements is written later.
template <class T> FASTGAN_INLINE void store_before(T* p, vec_t<T> v, int64_t n, const T* limit) {
  constexpr int W = lanes<acc_t<T>>;
  if (n >= W || p + W <= limit)
    store(p, v);
  else
    store_part(p, v, static_cast<int>(n));
}

// This thread's part of `count`.
struct Share {
  int64_t first, last;
  explicit Share(int64_t count)
      : first(count * omp_get_thread_num() / omp_get_num_threads()),
        last(count * (omp_get_thread_num() + 1) / omp_get_num_threads()) {}
};

// ── Rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

// The C channels of one output: Σ taps[i·tap_row + j·up] · from[i·row + j·C], i < lines, j < count.
template <class S, class T>
FASTGAN_INLINE void sum_pixel(const S* from, int64_t row, int64_t lines, int64_t C, const acc_t<T>* taps, int64_t tap_row,
                              int64_t up, int64_t count, const S* end, T* to, const T* limit) {
  constexpr int W = lanes<acc_t<T>>;
  int64_t c = 0;
  for (; c + 4 * W <= C; c += 4 * W) {
    vec_t<T> sums[4] = {};
    for (int64_t i = 0; i < lines; ++i) add_taps<4>(sums, from + i * row + c, C, taps + i * tap_row, up, count);
    for (int u = 0; u < 4; ++u) store(to + c + u * W, sums[u]);
  }
  for (; c < C; c += W) {
    vec_t<T> sum = {};
    for (int64_t i = 0; i < lines; ++i) add_taps(sum, from + i * row + c, C, taps + i * tap_row, up, count, C - c, end);
    store_before(to + c, sum, C - c, limit);
  }
}

template <class T> void resample_rows(const UpFirDn2d& a, const Filter<acc_t<T>>& f, const T* x, T* y) {
  using Acc = acc_t<T>;
  constexpr int W = lanes<Acc>;
  const int64_t width = a.x.in * a.C, out_width = a.x.out * a.C;
  const T* const end = x + a.N * a.y.in * width;
  const Windows vertical(a.y), horizontal(a.x);
  // Where every pixel has the same taps, C does not matter: between zeros a whole line is filtered at once.
  constexpr int64_t piece = 2048;
  const bool is_uniform = f.is_product && a.x.up == 1 && a.x.down == 1;
  const int64_t left = is_uniform ? larger(0, a.x.pad) * a.C : 0, right = is_uniform ? larger(0, f.w - 1 - a.x.pad) * a.C : 0;
  const int64_t size = left + larger(width, out_width) + right + 4 * W;
#pragma omp parallel if (a.N * (a.y.in * width + a.y.out * out_width) > parallel_threshold)
  {
    const Scratch<Acc> zeros_and_line(size);
    __builtin_memset(zeros_and_line.data, 0, size * sizeof(Acc));
    Acc* const line = zeros_and_line.data + left;
    const Share share(a.N * a.y.out);
    T* const limit = y + share.last * out_width;
    for (int64_t o = share.first; o < share.last; ++o) {
      const Window down = vertical[o % a.y.out];
      const T* const rows = x + (o / a.y.out * a.y.in + down.input) * width;
      T* const to = y + o * out_width;
      if (is_uniform) {
        // A piece of the line is filtered while it is in the L1.
        for (int64_t from = 0, i = 0; i < out_width; from += piece) {
          const int64_t n = smaller(piece, width - from), ready = from + n + (a.x.pad - f.w + 1) * a.C - 4 * W;
          if (n > 0) sum_rows(rows + from, width, n, &f.taps[down.tap], a.y.up, down.count, end, 1, size, line + from);
          for (; i < (from + piece >= width ? out_width : smaller(ready, out_width)); i += 4 * W) {
            vec_t<T> sums[4] = {};
            add_taps<4>(sums, line - a.x.pad * a.C + i, a.C, &f.taps[f.h], 1, f.w);
            for (int u = 0; u < 4 && i + u * W < out_width; ++u) store_before(to + i + u * W, sums[u], out_width - i - u * W, limit);
          }
        }
        continue;
      }
      if (f.is_product) sum_rows(rows, width, width, &f.taps[down.tap], a.y.up, down.count, end, 1, size, line);
      for (int64_t ox = 0; ox < a.x.out; ++ox) {
        const auto [input, tap, count] = horizontal[ox];
        if (f.is_product)
          sum_pixel(line + input * a.C, size, 1, a.C, &f.taps[f.h + tap], 0, a.x.up, count, line + size, to + ox * a.C, limit);
        else
          sum_pixel(rows + input * a.C, width, down.count, a.C, &f.taps[down.tap * f.w + tap], a.y.up * f.w, a.x.up, count,
                    end, to + ox * a.C, limit);
      }
    }
  }
}

// ── Planes ───────────────────────────────────────────────────────────────────────────────────────────────────────────

template <int U> struct Together {
  static constexpr int count = U;
};
template <class V> struct Length;
template <class V, int U> struct Length<V (&)[U]> {
  static constexpr int value = U;
};
template <class V> constexpr int length_of = Length<V>::value;

// Outputs r, r + out_phases, … of a row are sums over taps of vectors of a line. With the phases of the line, in which the
// taps take turns, these vectors are one element apart.
struct Run {
  int64_t at, tap, count;
};

struct Across {
  int64_t in_phases, out_phases; // down and up, without their common factors
  int64_t vectors_end;           // elements of an output phase, in whole vectors
  int64_t before, length;        // of one phase of a line: zeros in front, and all
  Scratch<Run> runs;             // (out_phases, in_phases)

  Across(const Resampling& a, int64_t W) : in_phases(a.down / common(a)), out_phases(a.up / common(a)), runs(in_phases * out_phases) {
    vectors_end = ceil_div(ceil_div(a.out, out_phases), W) * W;
    int64_t lowest = 0, highest = 0;
    for (int64_t r = 0; r < out_phases; ++r) {
      const int64_t start = r * a.down - a.pad, first = floor_div(start + a.up - 1, a.up), tap = first * a.up - start;
      const int64_t count = tap < a.taps ? (a.taps - 1 - tap) / a.up + 1 : 0;
      for (int64_t d = 0; d < in_phases; ++d) {
        const int64_t at = floor_div(first + d, in_phases), own = larger(0, ceil_div(count - d, in_phases));
        runs[r * in_phases + d] = {at, tap + d * a.up, own};
        if (own == 0) continue;
        lowest = smaller(lowest, at);
        highest = larger(highest, at + own);
      }
    }
    before = -lowest;
    length = before + larger(ceil_div(a.in, in_phases) + 4 * W, highest + vectors_end);
    for (int64_t r = 0; r < out_phases; ++r) {
      const int64_t start = r * a.down - a.pad, first = floor_div(start + a.up - 1, a.up);
      for (int64_t d = 0; d < in_phases; ++d)
        runs[r * in_phases + d].at += before + (first + d - floor_div(first + d, in_phases) * in_phases) * length;
    }
  }

  static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
  static int64_t common(const Resampling& a) {
    int64_t m = a.up, n = a.down;
    while (n) {
      const int64_t rest = m % n;
      m = n;
      n = rest;
    }
    return m;
  }
};

template <class T> void resample_planes(const UpFirDn2d& a, const Filter<acc_t<T>>& f, const T* x, T* y) {
  using Acc = acc_t<T>;
  constexpr int W = lanes<Acc>;
  const int64_t in = a.x.in, out = a.x.out, planes = a.N * a.C;
  const T* const end = x + planes * a.y.in * in;
  const Windows vertical(a.y);
  const Across across(a.x, W);
  const int64_t size = across.in_phases * across.length, step = a.x.up * across.in_phases;
  // Several lines at a time: one that is read as soon as it is written is read when the writes have left the store buffer.
  constexpr int64_t ahead = 2048;
  const int64_t lines = f.is_product ? larger(1, ahead / size) : (f.h - 1) / a.y.up + 1;
  const Acc one = 1;
#pragma omp parallel if (planes * (a.y.in * in + a.y.out * out) > parallel_threshold)
  {
    const Share share(planes * a.y.out);
    T* const limit = y + share.last * out;
    const Scratch<Acc> line(lines * size), phases(across.out_phases * across.vectors_end);
    const Scratch<int64_t> held(lines); // which row of x a line is
    __builtin_memset(line.data, 0, lines * size * sizeof(Acc));
    for (int64_t i = 0; i < lines; ++i) held[i] = -1;
    const auto fill = [&](int64_t i, int64_t row, const Acc* taps, int64_t count) {
      sum_rows(x + row * in, in, in, taps, a.y.up, count, end, across.in_phases, across.length, &line[i * size + across.before]);
    };
    // Writes a row of y; sum(totals, run, m) adds to U vectors of an output phase, from its element m on.
    const auto finish = [&](T* to, const auto& sum) __attribute__((always_inline)) {
      const auto phase = [&](auto& totals, int64_t r, int64_t m) __attribute__((always_inline)) {
        for (int64_t d = 0; d < across.in_phases; ++d) sum(totals, across.runs[r * across.in_phases + d], m);
      };
      // U vectors of each phase at a time: so many sums are under way at once.
      const auto write = [&](auto vectors, int64_t m) __attribute__((always_inline)) {
        constexpr int U = decltype(vectors)::count;
        if (across.out_phases == 1) {
          vec_t<T> totals[U] = {};
          phase(totals, 0, m);
          for (int u = 0; u < U && m + u * W < out; ++u) store_before(to + m + u * W, totals[u], out - m - u * W, limit);
        } else if (across.out_phases == 2) {
          vec_t<T> even[U] = {}, odd[U] = {};
          phase(even, 0, m);
          phase(odd, 1, m);
          for (int u = 0; u < U; ++u) {
            const Pair<Acc> pair = interleave<Acc>({even[u], odd[u]});
            const int64_t at = 2 * (m + u * W);
            if (at < out) store_before(to + at, pair.a, out - at, limit);
            if (at + W < out) store_before(to + at + W, pair.b, out - at - W, limit);
          }
        } else {
          for (int64_t r = 0; r < across.out_phases; ++r) {
            vec_t<T> totals[U] = {};
            phase(totals, r, m);
            for (int i = 0; i < U * W; ++i) phases[(m + i) * across.out_phases + r] = totals[i / W][i % W];
          }
        }
      };
      int64_t m = 0;
      for (; m + 4 * W <= across.vectors_end; m += 4 * W) write(Together<4>{}, m);
      for (; m < across.vectors_end; m += W) write(Together<1>{}, m);
      if (across.out_phases > 2)
        for (int64_t i = 0; i < out; i += W) store_before(to + i, load(&phases[i]), out - i, limit);
    };
    if (f.is_product)
      for (int64_t o = share.first; o < share.last; o += lines) {
        const int64_t count = smaller(lines, share.last - o);
        for (int64_t i = 0; i < count; ++i) {
          const Window down = vertical[(o + i) % a.y.out];
          fill(i, (o + i) / a.y.out * a.y.in + down.input, &f.taps[down.tap], down.count);
        }
        for (int64_t i = 0; i < count; ++i)
          finish(y + (o + i) * out, [&](auto& totals, const Run& run, int64_t m) __attribute__((always_inline)) {
            add_taps<length_of<decltype(totals)>>(totals, &line[i * size + run.at + m], 1, &f.taps[f.h + run.tap], step, run.count);
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
        finish(y + o * out, [&](auto& totals, const Run& run, int64_t m) __attribute__((always_inline)) {
          for (int64_t j = 0; j < down.count; ++j)
            add_taps<length_of<decltype(totals)>>(totals, &line[(top + j) % lines * size + run.at + m], 1,
                                                  &f.taps[(down.tap + j * a.y.up) * f.w + run.tap], step, run.count);
        });
      }
  }
}

template <class T> void resample(const UpFirDn2d& a, const void* x, const void* filter, void* y) {
  const Filter<acc_t<T>> f(a, filter);
  if (a.rows)
    resample_rows(a, f, static_cast<const T*>(x), static_cast<T*>(y));
  else
    resample_planes(a, f, static_cast<const T*>(x), static_cast<T*>(y));
}

void upfirdn2d(const UpFirDn2d& a, const void* x, const void* filter, void* y) {
  FASTGAN_BY_DTYPE(resample, (a, x, filter, y), a.dtype)
}
