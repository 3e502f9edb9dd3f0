// The engine of the norms: sums over the slices of a tensor, and an elementwise pass with coefficients made from them.
//
// A slice is what has coefficients of its own: a channel of the batch, or a channel of a sample. A unit is the slices that
// share their statistics: one of them, or a group. Every order has one shape: sums per slice over blocks of a fixed size, a
// finish per unit that merges the blocks in order (so the bits do not depend on the number of threads), and one elementwise
// pass with the coefficients of each slice.

constexpr int unroll = 4; // independent accumulators, to cover the latency of an addition
// Of the walks below: those that pay. Of float64 and float16, and of x86-64 without AVX2, nobody asks speed; with one there is
// half as much to compile.
#if defined(__x86_64__) && FASTGAN_VECTOR_BYTES == 16
template <class T> constexpr int accumulators = 1;
#else
template <class T> constexpr int accumulators = unroll;
template <> constexpr int accumulators<double> = 1;
template <> constexpr int accumulators<float16> = 1;
#endif
constexpr int run = 64;   // additions to one accumulator before a double takes over: long float32 sums lose digits

FASTGAN_INLINE double fixed_slope(const NormAct& a) {
  return a.act == Act::none ? 1 : a.act == Act::relu ? 0 : a.negative_slope;
}

template <class T> struct Activation {
  using vec = vec_t<T>;
  using mask = typename Lanes<acc_t<T>>::mask;
  vec slope; // of all slices, where they have none of their own
  mask rectify; // all ones for relu, whose negative side is 0 whatever comes in

  explicit Activation(const NormAct& a)
      : slope(broadcast<acc_t<T>>(fixed_slope(a))),
        rectify(mask{} - (a.act == Act::relu)) {}

  inline __attribute__((always_inline)) vec value(vec pre, vec slope) const {
    return pre <= 0 ? keep(~rectify, pre * slope) : pre;
  }
  inline __attribute__((always_inline)) vec value(vec pre) const { return value(pre, slope); }
  // torch's conventions at NaN: relu passes the gradient, leaky_relu and prelu multiply it by the slope.
  inline __attribute__((always_inline)) mask below(vec pre) const { return (pre <= 0) | ((pre != pre) & ~rectify); }
  inline __attribute__((always_inline)) vec gradient(vec pre, vec g, vec slope) const {
    return below(pre) ? keep(~rectify, g * slope) : g;
  }
  inline __attribute__((always_inline)) vec gradient(vec pre, vec g) const { return gradient(pre, g, slope); }
};

// A slice's numbers: a table of P rows of as many columns as there are slices, of which a kernel holds one vector each.
template <class T, int P> struct Channel {
  vec_t<T> p[P ? P : 1];
  int64_t start; // of the slice in memory, where it lies in one piece
};

// Numbers of the slices from `first` on, a row of each kind.
template <class Acc> struct Table {
  int64_t stride; // of an odd number of cache lines: rows a power of two apart would take each other's places in the caches
  int64_t first = 0;
  Scratch<Acc> numbers;

  Table(int64_t rows, int64_t slices)
      : stride((ceil_div(slices * sizeof(Acc), 64) | 1) * 64 / sizeof(Acc)), numbers(rows * stride) {}
  Acc* at(int64_t row, int64_t slice) const { return &numbers[row * stride + slice - first]; }
  template <int N> inline __attribute__((always_inline)) void store(int64_t row, int64_t slice, const double (&values)[N]) const {
    for (int i = 0; i < N; ++i) *at(row + i, slice) = static_cast<Acc>(values[i]);
  }
};

// Which pixels, of all images one after the other, the lanes of a vector hold: consecutive ones, or channels of the same one.
struct Pixels {
  int64_t first;
};
struct OnePixel {
  int64_t index;
};

// Which elements belong together.
struct Slices {
  int64_t samples, images, C, S; // samples with statistics of their own, and the images of each
  int64_t group, count, units;   // slices that share statistics, all slices, count / group

  explicit Slices(const NormAct& a) : samples(a.groups ? a.N : 1), images(a.groups ? 1 : a.N), C(a.C), S(a.S) {
    group = a.groups ? C / a.groups : 1;
    count = samples * C;
    units = count / group;
  }
  double unit_size() const { return static_cast<double>(group) * images * S; }
  bool threads() const { return count * images * S > parallel_threshold; }
  // How far on in memory is what a walk comes to next: the plane after this one, or some rows on. Hardware does not look
  // beyond a page, and so it is fetched.
  int64_t next(Pixels) const { return images > 1 ? C * S : S; }
  int64_t next(OnePixel) const { return 8 * C; }
  template <class T, class Where> inline __attribute__((always_inline)) void fetch_next(const T* at, Where where) const {
    __builtin_prefetch(at + next(where), 0, 2);
  }
  template <class T, class Where> inline __attribute__((always_inline)) void fetch_next_to_store(T* at, Where where) const {
    __builtin_prefetch(at + next(where), 1, 2);
  }
  bool many(int64_t pieces) const { return pieces >= 2 * omp_get_max_threads(); }
};

// Memory (samples, images, C, S). A block is some images of one slice, or a piece of one large plane.
struct Planes : Slices {
  static constexpr int64_t block_elements = 8192;
  int64_t piece, pieces, together, blocks; // blocks: of a slice

  explicit Planes(const NormAct& a) : Slices(a) {
    piece = smaller(S, block_elements);
    pieces = ceil_div(S, larger(piece, 1));
    together = larger(1, block_elements / larger(S, 1));
    blocks = ceil_div(images, together) * pieces;
  }
  // Where block b of a slice begins; a division takes as long as a small plane.
  int64_t first_image(int64_t b) const { return (pieces == 1 ? b : b / pieces) * together; }
  int64_t first_pixel(int64_t b) const { return pieces == 1 ? 0 : b % pieces * piece; }
  int64_t size(int64_t b) const {
    const int64_t n = first_image(b), s = first_pixel(b);
    return (smaller(n + together, images) - n) * (smaller(s + piece, S) - s);
  }

  // The mean of the first values of block b of channel c of a sample.
  template <class T, class Value> acc_t<T> first_mean(const Value& value, int64_t sample, int64_t c, int64_t b) const {
    constexpr int W = lanes<acc_t<T>>;
    const int64_t s = first_pixel(b), n = smaller(smaller(s + piece, S) - s, unroll * W);
    const int64_t image = sample * images + first_image(b), offset = (image * C + c) * S + s, pixel = image * S + s;
    vec_t<T> total = {};
    for (int64_t i = 0; i < n; i += W)
      total += value(offset + i, static_cast<int>(smaller(W, n - i)), Pixels{pixel + i});
    return static_cast<acc_t<T>>(sum<acc_t<T>>(total) / n);
  }

  // f(sums, channel, offset, n, pixels) for every vector of block b of channels [first, last) of a sample, whose numbers begin
  // at `table`; after each channel flush(k, c, sum).
  template <class T, int P, int K, class F, class Flush>
  inline __attribute__((always_inline)) void walk(const acc_t<T>* table, int64_t stride, int64_t sample, int64_t first,
                                                  int64_t last, int64_t b, F f, Flush flush) const {
    constexpr int W = lanes<acc_t<T>>, tall = accumulators<T>;
    const int64_t n0 = sample * images + first_image(b), n1 = smaller(n0 + together, (sample + 1) * images);
    const int64_t s = first_pixel(b), length = smaller(s + piece, S) - s, segment = run * tall * W;
    const int64_t sharing = n1 - n0 == 1 ? 1 : larger(1, run / (length / (tall * W) + tall)); // small planes that share accumulators
    for (int64_t c = first; c < last; ++c, ++table) {
      Channel<T, P> channel;
      channel.start = (sample * C + c) * S;
      for (int i = 0; i < P; ++i) channel.p[i] = broadcast<acc_t<T>>(table[i * stride]);
      Doubles<acc_t<T>> totals[K ? K : 1] = {};
      for (int64_t image = n0; image < n1; image += sharing)
        for (int64_t begin = 0; begin < length; begin += segment) {
          vec_t<T> sums[tall][K ? K : 1] = {};
          const int64_t end = smaller(begin + segment, length);
          for (int64_t n = image; n < smaller(image + sharing, n1); ++n) {
            const int64_t offset = (n * C + c) * S + s, pixel = n * S + s;
            int64_t i = begin;
            for (; i + tall * W <= end; i += tall * W)
              for (int u = 0; u < tall; ++u) f(sums[u], channel, offset + i + u * W, W, Pixels{pixel + i + u * W});
            if constexpr (tall > 1)
              for (; i + W <= end; i += W) f(sums[0], channel, offset + i, W, Pixels{pixel + i});
            if (i < end) f(sums[0], channel, offset + i, static_cast<int>(end - i), Pixels{pixel + i});
          }
          for (int k = 0; k < K; ++k) {
            vec_t<T> all = sums[0][k];
            for (int u = 1; u < tall; ++u) all += sums[u][k];
            totals[k] += Doubles<acc_t<T>>::of(all);
          }
        }
      if constexpr (K > 0) {
        double sums[K];
        sum_lanes<acc_t<T>, K>(totals, sums);
        for (int k = 0; k < K; ++k) flush(k, c, sums[k]);
      }
    }
  }
};

// Memory (samples, images·S, C). A block is some rows of all channels.
struct Rows : Slices {
  // Few enough blocks, and tall enough ones, that merging them is cheap; small enough ones that a second pass over a block
  // finds it in the L2.
  static constexpr int64_t block_elements = 8192, least_height = 128, most_blocks = 128;
  int64_t M, height, blocks; // rows of a sample, of a block; blocks of a sample

  explicit Rows(const NormAct& a) : Slices(a), M(images * S) {
    height = larger(larger(least_height, block_elements / larger(C, 1)), ceil_div(M, most_blocks));
    blocks = ceil_div(M, height);
  }
  int64_t size(int64_t b) const { return smaller((b + 1) * height, M) - b * height; }

  // The mean of the values in the first rows of block b of a sample, for every channel: value(c, offset, n, pixel).
  template <class T, class Value> void first_mean(const Value& value, int64_t sample, int64_t b, acc_t<T>* mean) const {
    constexpr int W = lanes<acc_t<T>>;
    const int64_t begin = sample * M + b * height, rows = smaller(size(b), 8);
    for (int64_t c = 0; c < C; c += W) {
      const int n = static_cast<int>(smaller(W, C - c));
      vec_t<T> total = {};
      for (int64_t r = begin; r < begin + rows; ++r) total += value(c, r * C + c, n, OnePixel{r});
      store(mean + c, total / static_cast<acc_t<T>>(rows), n);
    }
  }

  // f(sums, channel, offset, n, pixel) for every vector of block b of a sample; then flush(k, c, sums, n) for every vector
  // of channels. Where C is no multiple of a vector, the last channels come first, as whole vectors that reach into the next
  // row: what f stores there is overwritten when the row's own turn comes, and what it adds up there is not flushed.
  template <class T, int P, int K, class F, class Flush>
  inline __attribute__((always_inline)) void walk(const acc_t<T>* table, int64_t stride, int64_t sample, int64_t b, F f,
                                                  Flush flush) const {
    // 256 bytes of a row side by side: shorter runs, with gaps between them, come slowly from memory. More sums than two for
    // each vector do not find room in the registers.
    constexpr int W = lanes<acc_t<T>>, most = accumulators<T>;
    constexpr int wide = most == 1 || K > 2 || FASTGAN_VECTOR_BYTES == 64 ? most : 2 * most;
    int64_t c = 0;
    if (C % W) columns<T, P, K, 1>(table, stride, sample, b, C / W * W, static_cast<int>(C % W), f, flush);
    if constexpr (wide > most)
      for (; c + wide * W <= C; c += wide * W) columns<T, P, K, wide>(table, stride, sample, b, c, W, f, flush);
    if constexpr (most > 1)
      for (; c + most * W <= C; c += most * W) columns<T, P, K, most>(table, stride, sample, b, c, W, f, flush);
    for (; c + W <= C; c += W) columns<T, P, K, 1>(table, stride, sample, b, c, W, f, flush);
  }

private:
  // `Wide` vectors side by side, or of one, several rows at a time.
  template <class T, int P, int K, int Wide, class F, class Flush>
  inline __attribute__((always_inline)) void columns(const acc_t<T>* table, int64_t stride, int64_t sample, int64_t b,
                                                     int64_t c, int n, F f, Flush flush) const {
    constexpr int W = lanes<acc_t<T>>, tall = Wide == 1 ? accumulators<T> : 1;
    Channel<T, P> channel[Wide];
    for (int u = 0; u < Wide; ++u)
      for (int i = 0; i < P; ++i) channel[u].p[i] = load(table + i * stride + c + u * W, n);
    Doubles<acc_t<T>> totals[Wide][K ? K : 1] = {};
    const int64_t begin = sample * M + b * height, end = begin + size(b), whole = end - ceil_div(W - n, C);
    for (int64_t first = begin; first < end; first += run * tall) {
      vec_t<T> sums[tall][Wide][K ? K : 1] = {};
      const int64_t last = smaller(first + run * tall, end);
      int64_t r = first;
      for (; r + tall <= smaller(last, whole); r += tall)
        for (int v = 0; v < tall; ++v)
          for (int u = 0; u < Wide; ++u) f(sums[v][u], channel[u], (r + v) * C + c + u * W, W, OnePixel{r + v});
      if constexpr (Wide == 1)
        for (; r < last; ++r) f(sums[0][0], channel[0], r * C + c, n, OnePixel{r});
      for (int v = 0; v < tall; ++v)
        for (int u = 0; u < Wide; ++u)
          for (int k = 0; k < K; ++k) totals[u][k] += Doubles<acc_t<T>>::of(sums[v][u][k]);
    }
    for (int u = 0; u < Wide; ++u)
      for (int k = 0; k < K; ++k) flush(k, c + u * W, totals[u][k], n);
  }
};

struct Nothing {
  template <class... A> void operator()(const A&...) const {}
};

// Slices whose sums are merged and whose coefficients are made together, in vectors: some of a sample, of whole units.
struct Packs {
  static constexpr int64_t most = 64;
  int64_t samples, C, size; // slices of one, but of the last of a sample
  Packs(const Slices& slices, int64_t wanted)
      : samples(slices.samples), C(slices.C), size(larger(1, smaller(wanted, most) / slices.group) * slices.group) {}
  // f(sample, first channel, last) for the packs of a sample.
  template <class F> void of(int64_t sample, const F& f) const {
    for (int64_t first = 0; first < C; first += size) f(sample, first, smaller(first + size, C));
  }
  // The same for all packs, shared out among the threads of a parallel region.
  template <class F> void share(const F& f) const {
#pragma omp for collapse(2) schedule(static)
    for (int64_t sample = 0; sample < samples; ++sample)
      for (int64_t first = 0; first < C; first += size) f(sample, first, smaller(first + size, C));
  }
};

// The phases of every order, on Tables(blocks, slices, joined) of the slices from tables.begin(slice) on:
//   planes: prepare(tables, sample, first channel, last) and finish likewise, of whole units,
//           reduce(tables, sample, first channel, last, b) and apply likewise
//   rows:   prepare and finish as for planes, reduce(tables, sample, b) and apply likewise
// `summed` are the planes themselves, or in their place units, which lie in one piece: each is `joined` planes.
template <class Tables, class Prepare, class Reduce, class Finish, class Apply>
void run_planes(const Planes& summed, const Planes& planes, Prepare prepare, Reduce reduce, Finish finish, Apply apply) {
  const int64_t C = planes.C, joined = C / larger(summed.C, 1);
  // What fits in the L1 is read from further away once; a unit that fits in the L2, from memory.
  constexpr int64_t near = 4096;
  const int64_t shared = planes.count / (4 * omp_get_max_threads()), fits = near / larger(planes.images * planes.S, 1);
  const Packs packs(planes, smaller(shared, fits));
  if (planes.many(planes.units)) {
#pragma omp parallel if (planes.threads())
    {
      Tables tables(summed.blocks, packs.size, joined);
      packs.share([&](int64_t sample, int64_t first, int64_t last) {
        tables.begin(sample * C + first);
        prepare(tables, sample, first, last);
        for (int64_t b = 0; b < summed.blocks; ++b) reduce(tables, sample, first / joined, last / joined, b);
        finish(tables, sample, first, last);
        for (int64_t b = 0; b < planes.blocks; ++b) apply(tables, sample, first, last, b);
      });
    }
    return;
  }
  const Tables tables(summed.blocks, planes.count, joined);
#pragma omp parallel if (planes.threads())
  {
    packs.share([&](auto... pack) { prepare(tables, pack...); });
#pragma omp for collapse(3) schedule(static)
    for (int64_t sample = 0; sample < planes.samples; ++sample)
      for (int64_t c = 0; c < summed.C; ++c)
        for (int64_t b = 0; b < summed.blocks; ++b) reduce(tables, sample, c, c + 1, b);
    packs.share([&](auto... pack) { finish(tables, pack...); });
#pragma omp for collapse(3) schedule(static)
    for (int64_t sample = 0; sample < planes.samples; ++sample)
      for (int64_t c = 0; c < C; ++c)
        for (int64_t b = 0; b < planes.blocks; ++b) apply(tables, sample, c, c + 1, b);
  }
}

// The second pass runs backwards: it begins with what the first has read last, which is still in the thread's L2.
template <class Tables, class Prepare, class Reduce, class Finish, class Apply>
void run_rows(const Rows& rows, Prepare prepare, Reduce reduce, Finish finish, Apply apply) {
  const int64_t C = rows.C, blocks = rows.blocks;
  const Packs packs(rows, Packs::most);
  if (rows.many(rows.samples)) {
#pragma omp parallel if (rows.threads())
    {
      Tables tables(blocks, C, 1);
#pragma omp for schedule(static)
      for (int64_t sample = 0; sample < rows.samples; ++sample) {
        tables.begin(sample * C);
        packs.of(sample, [&](auto... pack) { prepare(tables, pack...); });
        for (int64_t b = 0; b < blocks; ++b) reduce(tables, sample, b);
        packs.of(sample, [&](auto... pack) { finish(tables, pack...); });
        for (int64_t b = blocks; b-- > 0;) apply(tables, sample, b);
      }
    }
    return;
  }
  const Tables tables(blocks, rows.count, 1);
#pragma omp parallel if (rows.threads())
  {
    packs.share([&](auto... pack) { prepare(tables, pack...); });
    const Share own(rows.samples * blocks);
    for (int64_t i = own.first; i < own.last; ++i) reduce(tables, i / blocks, i % blocks);
#pragma omp barrier
    packs.share([&](auto... pack) { finish(tables, pack...); });
    for (int64_t i = own.last; i-- > own.first;) apply(tables, i / blocks, i % blocks);
  }
}

struct One {
  constexpr operator int64_t() const { return 1; }
};
// f(unit, channel, group, i) for the units of channels [first, last) of a sample: the unit's number, its first slice's
// channel, its number of slices, which the compiler knows where it is one, so that it vectorises f, and how many slices of
// the range come before.
template <class F> FASTGAN_INLINE void for_units(const Slices& slices, int64_t sample, int64_t first, int64_t last, F f) {
  const int64_t of_sample = sample * slices.C;
  if (slices.group == 1) {
#pragma omp simd
    for (int64_t c = first; c < last; ++c) f(of_sample + c, c, One{}, c - first);
  } else {
    for (int64_t c = first; c < last; c += slices.group) f((of_sample + c) / slices.group, c, slices.group, c - first);
  }
}

// body(channel, offset, n) for every vector, where the slices' numbers, P rows of them, are known. Planes are gone through as
// they lie: one channel after the other, small ones would be on a page each. The body may stream.
template <class T, int P, class Body> void for_all(const NormAct& a, const Table<acc_t<T>>& table, Body body) {
  using Acc = acc_t<T>;
  constexpr int W = lanes<Acc>;
  if (a.rows) {
    const Rows rows(a);
    const auto of_row = [&](vec_t<T>*, const Channel<T, P>& channel, int64_t offset, int n, OnePixel)
                            __attribute__((always_inline)) { body(channel, offset, n); };
#pragma omp parallel if (rows.threads())
    {
#pragma omp for collapse(2) schedule(static)
      for (int64_t sample = 0; sample < rows.samples; ++sample)
        for (int64_t b = 0; b < rows.blocks; ++b)
          rows.walk<T, P, 0>(table.at(0, sample * a.C), table.stride, sample, b, of_row, Nothing{});
      finish_streams();
    }
    return;
  }
  const Slices slices(a);
#pragma omp parallel if (slices.threads())
  {
    Channel<T, P> channel;
    const Share elements(a.N * a.C * a.S);
    int64_t at = elements.first, plane = at / larger(a.S, 1), slice = plane % larger(slices.count, 1);
    for (; at < elements.last; ++plane, slice = slice + 1 == slices.count ? 0 : slice + 1) {
      for (int i = 0; i < P; ++i) channel.p[i] = broadcast<Acc>(*table.at(i, slice));
      const int64_t end = smaller((plane + 1) * a.S, elements.last);
      for (; at + W <= end; at += W) body(channel, at, W);
      if (at < end) body(channel, at, static_cast<int>(end - at));
      at = end;
    }
    finish_streams();
  }
}

// The sums of a unit's slices: sums(i, k) is the k-th of its i-th slice.
struct Sums {
  const double* at;
  int64_t stride;
  double operator()(int64_t i, int k) const { return at[k * stride + i]; }
};
template <class T, int P, int K> struct SumTables {
  Table<acc_t<T>> coefficients;
  Table<double> sums; // K rows of block 0, of block 1, …
  SumTables(int64_t blocks, int64_t slices, int64_t) : coefficients(P, slices), sums(blocks * K, slices) {}
  void begin(int64_t slice) { coefficients.first = sums.first = slice; }
};

// Adds up `rows` rows of C numbers, which are `stride` apart, into the first of them and to what is at grad.
template <class Acc> void add_rows(double* numbers, int64_t rows, int64_t stride, int64_t C, void* grad) {
  if (!grad) return;
  for (int64_t row = 1; row < rows; ++row)
    for (int64_t c = 0; c < C; ++c) numbers[c] += numbers[row * stride + c];
  for (int64_t c = 0; c < C; ++c) static_cast<Acc*>(grad)[c] = rows ? static_cast<Acc>(numbers[c]) : 0;
}

// In a table of P rows `prepare(table, unit, channel, group)`, with the arguments of `for_units`, fills the first R; with them
// `reduce_body` adds up K products per slice, from which `finish(table, unit, channel, group, sums)` makes the other rows, and
// with all of them goes `apply_body`. What that adds to A sums goes, for each channel over all samples, to the arrays
// `totals`, any of which may be null.
template <class T, int R, int K, int P, int A = 0, class Prepare, class ReduceBody, class Finish, class ApplyBody>
void sum_finish_apply(const NormAct& a, const Prepare& prepare, ReduceBody reduce_body, Finish finish, ApplyBody apply_body,
                      void* const* totals = nullptr) {
  using Acc = acc_t<T>;
  using Tables = SumTables<T, P, K>;
  const int64_t C = a.C;
  const Slices slices(a);
  auto prepare_slices = [&](const Tables& tables, int64_t sample, int64_t first, int64_t last) {
    for_units(slices, sample, first, last, [&](int64_t unit, int64_t channel, auto group, int64_t) __attribute__((always_inline)) {
      prepare(tables.coefficients, unit, channel, group);
    });
  };
  auto finish_slices = [&](const Tables& tables, int64_t blocks, int64_t sample, int64_t first, int64_t last) {
    const Sums of_first{tables.sums.at(0, sample * C + first), tables.sums.stride};
    for (int64_t row = K; row < blocks * K; ++row) {
      double *to = tables.sums.at(row % K, sample * C + first), *from = tables.sums.at(row, sample * C + first);
      for (int64_t i = 0; i < last - first; ++i) to[i] += from[i];
    }
    for_units(slices, sample, first, last, [&](int64_t unit, int64_t channel, auto group, int64_t i) __attribute__((always_inline)) {
      finish(tables.coefficients, unit, channel, group, Sums{of_first.at + i, of_first.stride});
    });
  };
  if (a.rows) {
    const Rows rows(a);
    const int64_t blocks = rows.blocks;
    const Table<double> applied(rows.samples * blocks * A, C);
    run_rows<Tables>(
        rows, prepare_slices,
        [&](const Tables& tables, int64_t sample, int64_t b) {
          const auto& [table, sums] = tables;
          rows.walk<T, R, K>(table.at(0, sample * C), table.stride, sample, b, reduce_body,
                             [&](int k, int64_t c, const Doubles<Acc>& of_lane, int n) {
                               __builtin_memcpy(sums.at(b * K + k, sample * C + c), &of_lane, n * sizeof(double));
                             });
        },
        [&](const Tables& tables, int64_t sample, int64_t first, int64_t last) {
          finish_slices(tables, blocks, sample, first, last);
        },
        [&](const Tables& tables, int64_t sample, int64_t b) {
          const Table<Acc>& table = tables.coefficients;
          rows.walk<T, P, A>(table.at(0, sample * C), table.stride, sample, b, apply_body,
                             [&](int k, int64_t c, const Doubles<Acc>& of_lane, int n) {
                               __builtin_memcpy(applied.at((sample * blocks + b) * A + k, c), &of_lane, n * sizeof(double));
                             });
        });
    for (int k = 0; k < A; ++k)
      add_rows<Acc>(applied.at(k, 0), rows.samples * blocks, A * applied.stride, C, totals[k]);
  } else {
    const Planes planes(a);
    const int64_t blocks = planes.blocks;
    const Table<double> applied(planes.samples * blocks * A, C);
    run_planes<Tables>(
        planes, planes, prepare_slices,
        [&](const Tables& tables, int64_t sample, int64_t first, int64_t last, int64_t b) {
          const auto& [table, sums] = tables;
          planes.walk<T, R, K>(
              table.at(0, sample * C + first), table.stride, sample, first, last, b, reduce_body,
              [&](int k, int64_t c, double total) { *sums.at(b * K + k, sample * C + c) = total; });
        },
        [&](const Tables& tables, int64_t sample, int64_t first, int64_t last) {
          finish_slices(tables, blocks, sample, first, last);
        },
        [&](const Tables& tables, int64_t sample, int64_t first, int64_t last, int64_t b) {
          const Table<Acc>& table = tables.coefficients;
          planes.walk<T, P, A>(
              table.at(0, sample * C + first), table.stride, sample, first, last, b, apply_body,
              [&](int k, int64_t c, double total) { *applied.at((sample * blocks + b) * A + k, c) = total; });
        });
    for (int k = 0; k < A; ++k)
      add_rows<Acc>(applied.at(k, 0), planes.samples * blocks, A * applied.stride, C, totals[k]);
  }
}

// Whether n numbers' distances to a shift, and the squares of these, with the given sums, tell their variance well: where
// the shift is no more than two standard deviations from the mean.
FASTGAN_INLINE bool tells_variance(double n, double distances, double squares) {
  return 5 * distances * distances <= 4 * n * squares;
}

// What `moments_finish_apply` takes the moments of, where that lies in memory as it is: a number for each element.
template <class T> struct Stored {
  static constexpr int P = 0; // numbers of its slice's that it is computed with
  const T* x;
  void fill(const Table<acc_t<T>>&, int64_t, int64_t, int64_t) const {}
  template <class Where>
  inline __attribute__((always_inline)) vec_t<T> operator()(const vec_t<T>*, int64_t offset, int n, Where) const {
    return load(x + offset, n);
  }
};

template <class T, int P, int R> struct MomentTables {
  int64_t joined;
  Table<acc_t<T>> coefficients, shift; // of shift R rows of block 0, of block 1, …
  Table<double> about, of_slices;
  MomentTables(int64_t blocks, int64_t slices, int64_t joined)
      : joined(joined), coefficients(P, slices), shift(blocks * R, slices / joined), about(blocks * 2, slices / joined),
        of_slices(2, slices) {}
  void begin(int64_t slice) {
    coefficients.first = of_slices.first = slice;
    shift.first = about.first = slice / joined;
  }
};

// Mean and biased variance of the values of every unit into a.mean, a.var; then finish(table, unit, channel, group), with the
// arguments of `for_units`, makes P rows of coefficients, and with them goes apply_body. Each block has a shift near its mean,
// taken from its first elements, and sums about it, merged in the manner of Chan, Golub and LeVeque (1983): exact for data far
// from zero. Where these elements were not like the rest, a second pass takes the mean itself.
template <class T, int P, class Values, class Finish, class ApplyBody>
void moments_finish_apply(const NormAct& a, const Values& values, const Finish& finish, ApplyBody apply_body) {
  using Acc = acc_t<T>;
  using vec = vec_t<T>;
  constexpr int R = 1 + Values::P; // what a block's first pass reads: the shift, and what the values are computed with
  using Tables = MomentTables<T, P, R>;
  const int64_t C = a.C;
  auto add_about = [&](vec* sums, const Channel<T, R>& channel, int64_t offset, int n, auto where) __attribute__((always_inline)) {
    vec t = values(channel.p + 1, offset, n, where) - channel.p[0];
    if (n < lanes<Acc>) t = keep(first_lanes<Acc>(n), t);
    sums[0] += t;
    sums[1] += t * t;
  };
  const Slices slices(a);
  // The moments of `count` slices of a layout from those of its blocks.
  auto merge = [](const auto& layout, const Tables& tables, int64_t slice, double* mean, double* var, int64_t count) {
    const double M = static_cast<double>(layout.images) * layout.S, each = 1 / M;
    for (int64_t i = 0; i < count; ++i) mean[i] = var[i] = 0;
    for (int64_t b = 0; b < layout.blocks; ++b) {
      const Acc* shift = tables.shift.at(b * R, slice);
      const double *distances = tables.about.at(2 * b, slice), share = layout.size(b) / M;
      // Divided, so that a mean that is an element of x comes out as that.
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) mean[i] += share * shift[i] + distances[i] / M;
    }
    for (int64_t b = 0; b < layout.blocks; ++b) {
      const Acc* shift = tables.shift.at(b * R, slice);
      const double *distances = tables.about.at(2 * b, slice), *squares = tables.about.at(2 * b + 1, slice);
      const double share = layout.size(b) * each;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const double away = shift[i] - mean[i];
        var[i] += squares[i] * each + away * (2 * distances[i] * each + share * away);
      }
    }
    for (int64_t i = 0; i < count; ++i) var[i] = var[i] < 0 ? 0 : var[i];
  };
  auto finish_slices = [&](const Tables& tables, int64_t sample, int64_t first, int64_t last) {
    for_units(slices, sample, first, last, [&](int64_t unit, int64_t channel, auto group, int64_t) __attribute__((always_inline)) {
      finish(tables.coefficients, unit, channel, group);
    });
  };
  if (a.rows) {
    const Rows rows(a);
    run_rows<Tables>(
        rows, Nothing(),
        [&](const Tables& tables, int64_t sample, int64_t b) {
          const Table<Acc>& shift = tables.shift;
          const int64_t slice = sample * C, size = rows.size(b);
          double *distances = tables.about.at(2 * b, slice), *squares = tables.about.at(2 * b + 1, slice);
          Acc* of_block = shift.at(b * R, slice);
          auto sum_about_shift = [&] {
            rows.walk<T, R, 2>(of_block, shift.stride, sample, b, add_about,
                               [&](int k, int64_t c, const Doubles<Acc>& totals, int n) {
                                 __builtin_memcpy(tables.about.at(2 * b + k, slice + c), &totals, n * sizeof(double));
                               });
          };
          for (int64_t c = 0; c < C; ++c) values.fill(shift, b * R + 1, slice + c, c);
          rows.first_mean<T>(
              [&](int64_t c, int64_t offset, int n, auto where) __attribute__((always_inline)) {
                vec p[R];
                for (int i = 0; i < Values::P; ++i) p[i] = load(shift.at(b * R + 1 + i, slice + c), n);
                return values(p, offset, n, where);
              },
              sample, b, of_block);
          sum_about_shift();
          bool good = true;
          for (int64_t c = 0; c < C; ++c) good &= tells_variance(size, distances[c], squares[c]);
          if (good) return;
          for (int64_t c = 0; c < C; ++c) of_block[c] = static_cast<Acc>(of_block[c] + distances[c] / size);
          sum_about_shift();
        },
        [&](const Tables& tables, int64_t sample, int64_t first, int64_t last) {
          const int64_t slice = sample * C + first;
          if (rows.group == 1) {
            merge(rows, tables, slice, a.mean + slice, a.var + slice, last - first);
          } else {
            double *mean = tables.of_slices.at(0, slice), *var = tables.of_slices.at(1, slice);
            merge(rows, tables, slice, mean, var, last - first);
            for_units(rows, sample, first, last, [&](int64_t unit, int64_t, int64_t group, int64_t i) {
              double from_first = 0, of_unit = 0;
              for (int64_t j = i + 1; j < i + group; ++j) from_first += mean[j] - mean[i];
              const double middle = mean[i] + from_first / group;
              for (int64_t j = i; j < i + group; ++j) of_unit += var[j] + (mean[j] - middle) * (mean[j] - middle);
              a.mean[unit] = middle;
              a.var[unit] = of_unit / group;
            });
          }
          finish_slices(tables, sample, first, last);
        },
        [&](const Tables& tables, int64_t sample, int64_t b) {
          const Table<Acc>& table = tables.coefficients;
          rows.walk<T, P, 0>(table.at(0, sample * C), table.stride, sample, b, apply_body, Nothing());
        });
  } else {
    // A unit lies in one piece, and is added up as one plane where its slices' values are not computed in different ways.
    NormAct in_one_piece = a;
    if (Values::P == 0 && slices.group > 1) in_one_piece.C = a.groups, in_one_piece.S = a.S * slices.group;
    const Planes planes(a), units(in_one_piece);
    run_planes<Tables>(
        units, planes, Nothing(),
        [&](const Tables& tables, int64_t sample, int64_t first, int64_t last, int64_t b) {
          const Table<Acc>& shift = tables.shift;
          const int64_t size = units.size(b), of_sample = sample * units.C;
          auto sum_about_shift = [&](int64_t first, int64_t last) {
            units.walk<T, R, 2>(
                shift.at(b * R, of_sample + first), shift.stride, sample, first, last, b, add_about,
                [&](int k, int64_t c, double total) { *tables.about.at(2 * b + k, of_sample + c) = total; });
          };
          for (int64_t c = first; c < last; ++c) {
            values.fill(shift, b * R + 1, of_sample + c, c);
            vec p[R];
            for (int i = 0; i < Values::P; ++i) p[i] = broadcast<Acc>(*shift.at(b * R + 1 + i, of_sample + c));
            *shift.at(b * R, of_sample + c) = units.first_mean<T>(
                [&](int64_t offset, int n, auto where) __attribute__((always_inline)) {
                  const vec value = values(p, offset, n, where);
                  return n < lanes<Acc> ? keep(first_lanes<Acc>(n), value) : value;
                },
                sample, c, b);
          }
          sum_about_shift(first, last);
          for (int64_t c = first; c < last; ++c) {
            const double distances = *tables.about.at(2 * b, of_sample + c);
            if (tells_variance(size, distances, *tables.about.at(2 * b + 1, of_sample + c))) continue;
            Acc* of_block = shift.at(b * R, of_sample + c);
            *of_block = static_cast<Acc>(*of_block + distances / size);
            sum_about_shift(c, c + 1);
          }
        },
        [&](const Tables& tables, int64_t sample, int64_t first, int64_t last) {
          const int64_t unit = sample * units.C + first / tables.joined, count = (last - first) / tables.joined;
          merge(units, tables, unit, a.mean + unit, a.var + unit, count);
          finish_slices(tables, sample, first, last);
        },
        [&](const Tables& tables, int64_t sample, int64_t first, int64_t last, int64_t b) {
          const Table<Acc>& table = tables.coefficients;
          planes.walk<T, P, 0>(table.at(0, sample * C + first), table.stride, sample, first, last, b, apply_body, Nothing());
        });
  }
}

// A unit's 1 / sqrt(var + eps), and what rounding took from its mean. In a group of one element, which is its mean, 0 gives
// the same values and gradients that are exactly 0.
FASTGAN_INLINE double inverse_deviation(const NormAct& a, int64_t unit) {
  return a.groups == a.C && a.S == 1 ? 0 : 1 / __builtin_sqrt(a.var[unit] + a.eps);
}
template <class Acc> double mean_remainder(const NormAct& a, int64_t unit) {
  return a.mean[unit] - static_cast<Acc>(a.mean[unit]);
}
// The elements of a vector that may be absent, which then are all the same.
template <class Acc> struct Elements {
  const Scratch<Acc> made;
  const Acc* data;
  Elements(const void* vector, int64_t count, double absent)
      : made(vector ? 0 : count), data(vector ? static_cast<const Acc*>(vector) : made.data) {
    for (int64_t i = 0; !vector && i < count; ++i) made[i] = static_cast<Acc>(absent);
  }
  double operator[](int64_t i) const { return data[i]; }
};

// Rows 0 to 3 of every table: the rounded mean, scale, bias less what rounding the mean adds, and the activation's slope.
// `pre` below is computed from them in one way only, so that forward and backward agree on its sign to the bit.
template <class Acc> struct Affine {
  const NormAct& a;
  const Slices slices;
  const Elements<Acc> weight, bias, slope; // of the channels

  explicit Affine(const NormAct& a)
      : a(a), slices(a), weight(a.weight, a.C, 1), bias(a.bias, a.C, 0), slope(a.prelu_weight, a.C, fixed_slope(a)) {}
  template <class Group>
  inline __attribute__((always_inline)) void operator()(const Table<Acc>& table, int64_t unit, int64_t channel,
                                                        Group group) const {
    const double mean = a.mean[unit], r = inverse_deviation(a, unit), rest = mean_remainder<Acc>(a, unit);
    for (int64_t i = 0; i < group; ++i) {
      const double scale = weight[channel + i] * r;
      table.store(0, unit * group + i, {mean, scale, bias[channel + i] - rest * scale, slope[channel + i]});
    }
  }
  void fill(const Table<Acc>& table) const {
    for (int64_t sample = 0; sample < slices.samples; ++sample)
      for_units(slices, sample, 0, slices.C, [&](int64_t unit, int64_t channel, auto group, int64_t) __attribute__((always_inline)) {
        (*this)(table, unit, channel, group);
      });
  }
};
template <class T, int P>
FASTGAN_INLINE vec_t<T> preactivation(const NormAct& a, const Channel<T, P>& channel, vec_t<T> t, int64_t offset, int n) {
  const vec_t<T> pre = t * channel.p[1] + channel.p[2];
  return a.residual ? pre + load(static_cast<const T*>(a.residual) + offset, n) : pre;
}

// The double backward's means over a unit, where h = weight·g, v = ggx, m = ggw·g, and x in a name stands for ·x̂. With
// P(v) = r·(v - E v - x̂·E[v x̂]), which is its own adjoint, and grad_x = P(h):
//   g_grad_y = act'(pre)·(weight·P(v) + ggw·x̂ + ggb + u)
//   g_x      = P(m - r·vx·h - r·hx·v) - r²·(vh - v·h - vx·hx)·x̂ = r·(z - E z - x̂·E[z x̂]) - r²·K·x̂
struct Means {
  double h = 0, hx = 0, v = 0, vx = 0, vh = 0, m = 0, mx = 0;
  double K() const { return vh - v * h - vx * hx; }
  double z(double r) const { return m - r * (vx * h + hx * v); }
  double zx(double r) const { return mx - 2 * r * vx * hx; }
};
