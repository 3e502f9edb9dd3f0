// y = act(pixel_shuffle(x)), and what its derivatives are made of. x (N, C·r², H, W) is coarse and y (N, C, r·H, r·W) fine:
// element (c·r² + i·r + j, h, w) of the one is element (c, r·h + i, r·w + j) of the other. With a side for each element and
// f(side, v) = positive·v where it is above 0, weight·v elsewhere:
//   forward    y      = shuffle(f(side, x))
//   backward   grad_x = f(side, unshuffle(grad_y))      grad_weight = Σ unshuffle(grad_y)·x where the side is not above 0
//
// Values are computed as they lie in x. A vector runs along a line of pixels of one channel, or along the channels c of one
// pixel, and is read and written where x and y have it: at r = 2 four vectors at a time, which are interleaved; else one,
// whose elements are apart. What is left over at the end of a line is done with elements of the vector before it, where there
// is one.

constexpr int64_t shuffle_block = 16384; // elements, at least, that leave one partial sum

template <class T> struct Slopes {
  using vec = vec_t<T>;
  using mask = typename Lanes<acc_t<T>>::mask;
  mask rectify; // all ones for relu, whose negative side is 0 whatever comes in
  mask positive;

  explicit Slopes(const PixelShuffleAct& a) : rectify(mask{} - (a.act == Act::relu)), positive(mask{} - a.positive) {}

  // torch's conventions at NaN: relu passes, the others multiply by the slope.
  inline __attribute__((always_inline)) mask above(vec side) const { return (side > 0) | ((side != side) & rectify); }
  inline __attribute__((always_inline)) vec apply(vec side, vec v, vec slope) const {
    return above(side) ? keep(positive, v) : keep(~rectify, v * slope);
  }
};

// Distances in memory: of samples, channels c, the r² elements of a channel, lines and pixels.
struct ShuffleStrides {
  int64_t x_n, x_c, x_k, x_h, x_w;
  int64_t y_n, y_c, y_h, y_w;

  explicit ShuffleStrides(const PixelShuffleAct& a) {
    const int64_t k = a.r * a.r, size = a.C * k * a.H * a.W;
    x_n = y_n = size;
    if (a.rows) {
      x_k = 1, x_c = k, x_w = a.C * k, x_h = a.W * x_w;
      y_c = 1, y_w = a.C, y_h = a.r * a.W * y_w;
    } else {
      x_w = 1, x_h = a.W, x_k = a.H * a.W, x_c = k * x_k;
      y_w = 1, y_h = a.r * a.W, y_c = k * x_k;
    }
  }
};

// The first elements of a vector, or of the first of several, and how many elements it has.
struct ShufflePlace {
  int64_t x, y;
  int n;
};

template <class T, int K> struct Vectors {
  static constexpr int count = K;
  vec_t<T> v[K];
};

// r = 2, along the pixels: lines of four planes, and two lines of one.
template <class T> struct PlanesByTwo {
  using All = Vectors<T, 4>;
  int64_t plane, line;

  inline __attribute__((always_inline)) All coarse(const T* p, const ShufflePlace& at) const {
    All all;
    for (int k = 0; k < 4; ++k) all.v[k] = load(p + at.x + k * plane, at.n);
    return all;
  }
  inline __attribute__((always_inline)) void coarse(T* p, const ShufflePlace& at, const All& all) const {
    for (int k = 0; k < 4; ++k) store(p + at.x + k * plane, all.v[k], at.n);
  }
  inline __attribute__((always_inline)) All fine(const T* p, const ShufflePlace& at) const {
    const Pair<acc_t<T>> upper = load_by_turns(p + at.y, at.n), lower = load_by_turns(p + at.y + line, at.n);
    return {{upper.a, upper.b, lower.a, lower.b}};
  }
  inline __attribute__((always_inline)) void fine(T* p, const ShufflePlace& at, const All& all) const {
    for (int i = 0; i < 2; ++i) store_by_turns(p + at.y + i * line, {all.v[2 * i], all.v[2 * i + 1]}, at.n);
  }
};

// r = 2, along the channels, of which there are as many as a vector has lanes: four vectors of one pixel, and one of each of
// four.
template <class T> struct RowsByTwo {
  using All = Vectors<T, 4>;
  static constexpr int W = lanes<acc_t<T>>;
  int64_t pixel, line;

  inline __attribute__((always_inline)) All coarse(const T* p, const ShufflePlace& at) const {
    const Pair<acc_t<T>> low = load_by_turns(p + at.x), high = load_by_turns(p + at.x + 2 * W);
    const Pair<acc_t<T>> even = deinterleave<acc_t<T>>({low.a, high.a}), odd = deinterleave<acc_t<T>>({low.b, high.b});
    return {{even.a, odd.a, even.b, odd.b}};
  }
  inline __attribute__((always_inline)) void coarse(T* p, const ShufflePlace& at, const All& all) const {
    const Pair<acc_t<T>> even = interleave<acc_t<T>>({all.v[0], all.v[2]}), odd = interleave<acc_t<T>>({all.v[1], all.v[3]});
    store_by_turns(p + at.x, {even.a, odd.a});
    store_by_turns(p + at.x + 2 * W, {even.b, odd.b});
  }
  inline __attribute__((always_inline)) All fine(const T* p, const ShufflePlace& at) const {
    All all;
    for (int k = 0; k < 4; ++k) all.v[k] = load(p + at.y + k / 2 * line + k % 2 * pixel);
    return all;
  }
  inline __attribute__((always_inline)) void fine(T* p, const ShufflePlace& at, const All& all) const {
    for (int k = 0; k < 4; ++k) store(p + at.y + k / 2 * line + k % 2 * pixel, all.v[k]);
  }
};

// Any r: one vector, and the distances of its elements.
template <class T> struct Apart {
  using All = Vectors<T, 1>;
  static constexpr int W = lanes<acc_t<T>>;
  int64_t x_step, y_step;

  inline __attribute__((always_inline)) All coarse(const T* p, const ShufflePlace& at) const {
    return {{gather(p + at.x, x_step, at.n)}};
  }
  inline __attribute__((always_inline)) void coarse(T* p, const ShufflePlace& at, const All& all) const {
    scatter(p + at.x, x_step, all.v[0], at.n);
  }
  inline __attribute__((always_inline)) All fine(const T* p, const ShufflePlace& at) const {
    return {{gather(p + at.y, y_step, at.n)}};
  }
  inline __attribute__((always_inline)) void fine(T* p, const ShufflePlace& at, const All& all) const {
    scatter(p + at.y, y_step, all.v[0], at.n);
  }

private:
  static inline __attribute__((always_inline)) vec_t<T> gather(const T* p, int64_t step, int n) {
    if (step == 1) return load(p, n);
    T whole[W] = {};
    for (int i = 0; i < n; ++i) whole[i] = p[i * step];
    return load(whole);
  }
  static inline __attribute__((always_inline)) void scatter(T* p, int64_t step, vec_t<T> v, int n) {
    if (step == 1) return store(p, v, n);
    T whole[W];
    store(whole, v);
    for (int i = 0; i < n; ++i) p[i * step] = whole[i];
  }
};

template <class Acc> FASTGAN_INLINE Acc slope_of(const PixelShuffleAct& a, int64_t c) {
  if (a.weight) return static_cast<const Acc*>(a.weight)[a.weights == 1 ? 0 : c];
  return static_cast<Acc>(a.act == Act::leaky_relu ? a.negative_slope : 1);
}

// f(access, place, slope) for all vectors along the pixels; what it returns is added up to totals, if these are not null.
template <class T, class Access, class F>
void walk_pixels(const PixelShuffleAct& a, const ShuffleStrides& s, const Access& access, void* totals, F f) {
  using Acc = acc_t<T>;
  using mask = typename Lanes<Acc>::mask;
  constexpr int W = lanes<Acc>;
  const int64_t squares = a.r * a.r, height = ceil_div(shuffle_block, a.W * squares), pieces = ceil_div(a.H, height);
  const int64_t blocks = a.N * pieces;
  const Scratch<double> partial(totals ? blocks * a.C : 0);
#pragma omp parallel for schedule(static) if (a.N * s.x_n > parallel_threshold)
  for (int64_t b = 0; b < blocks * a.C; ++b) {
    const int64_t n = b / a.C / pieces, c = b % a.C, top = b / a.C % pieces * height;
    const vec_t<T> slope = broadcast<Acc>(slope_of<Acc>(a, c));
    Doubles<Acc> total = {};
    for (int64_t h = top; h < smaller(top + height, a.H); ++h)
      for (int64_t k = 0; k < squares; k += Access::All::count) {
        const int64_t x = n * s.x_n + c * s.x_c + k * s.x_k + h * s.x_h, x_step = s.x_w;
        const int64_t y = n * s.y_n + c * s.y_c + (a.r * h + k / a.r) * s.y_h + k % a.r * s.y_w, y_step = a.r * s.y_w;
        const Access here = access;
        const auto add = [&](int64_t w, int n, mask fresh) __attribute__((always_inline)) {
          const vec_t<T> part = f(here, ShufflePlace{x + w * x_step, y + w * y_step, n}, slope);
          if (totals) total += Doubles<Acc>::of(keep(fresh, part));
        };
        const int64_t width = a.W;
        int64_t w = 0;
        for (; w + W <= width; w += W) add(w, W, ~mask{});
        if (w == 0)
          add(0, static_cast<int>(width), ~mask{});
        else if (w < width)
          add(width - W, W, ~first_lanes<Acc>(static_cast<int>(w - (width - W))));
      }
    if (totals) partial[b] = sum<Acc>(total);
  }
  if (totals) add_rows<Acc>(partial.data, blocks * a.C / a.weights, a.weights, a.weights, totals);
}

// Likewise along the channels, of which there are enough for a vector.
template <class T, class Access, class F>
void walk_channels(const PixelShuffleAct& a, const ShuffleStrides& s, const Access& access, void* totals, F f) {
  using Acc = acc_t<T>;
  using mask = typename Lanes<Acc>::mask;
  constexpr int W = lanes<Acc>;
  const int64_t squares = a.r * a.r, lines = a.N * a.H;
  const int64_t height = ceil_div(shuffle_block, a.W * a.C * squares), blocks = ceil_div(lines, height);
  const Scratch<double> partial(totals ? blocks * a.C : 0);
  const Scratch<Acc> slopes(a.C);
  for (int64_t c = 0; c < a.C; ++c) slopes[c] = slope_of<Acc>(a, c);
#pragma omp parallel for schedule(static) if (a.N * s.x_n > parallel_threshold)
  for (int64_t b = 0; b < blocks; ++b) {
    if (totals) __builtin_memset(&partial[b * a.C], 0, a.C * sizeof(double));
    for (int64_t line = b * height; line < smaller((b + 1) * height, lines); ++line)
      for (int64_t w = 0; w < a.W; ++w)
        for (int64_t k = 0; k < squares; k += Access::All::count) {
          const int64_t x = line * s.x_h + w * s.x_w + k * s.x_k;
          const int64_t y = (a.r * line + k / a.r) * s.y_h + (a.r * w + k % a.r) * s.y_w;
          const Access here = access;
          for (int64_t c = 0, x_step = s.x_c, channels = a.C; c < channels; c += W) {
            const int64_t first = smaller(c, channels - W);
            const vec_t<T> part = f(here, ShufflePlace{x + first * x_step, y + first, W}, load(&slopes[first]));
            if (!totals) continue;
            const mask fresh = ~first_lanes<Acc>(static_cast<int>(c - first));
            double* to = &partial[b * a.C + first];
            Doubles<Acc> total = read<Doubles<Acc>>(to);
            total += Doubles<Acc>::of(keep(fresh, part));
            __builtin_memcpy(to, &total, sizeof total);
          }
        }
  }
  if (totals) add_rows<Acc>(partial.data, blocks * a.C / a.weights, a.weights, a.weights, totals);
}

template <class T, class F> void walk(const PixelShuffleAct& a, void* totals, F f) {
  const ShuffleStrides s(a);
  if (a.rows && a.C >= lanes<acc_t<T>>)
    a.r == 2 ? walk_channels<T>(a, s, RowsByTwo<T>{s.y_w, s.y_h}, totals, f)
             : walk_channels<T>(a, s, Apart<T>{s.x_c, s.y_c}, totals, f);
  else
    a.r == 2 && !a.rows ? walk_pixels<T>(a, s, PlanesByTwo<T>{s.x_k, s.y_h}, totals, f)
                        : walk_pixels<T>(a, s, Apart<T>{s.x_w, a.r * s.y_w}, totals, f);
}

// The sides of the values: they themselves where there are no others.
template <class T> struct Sides {
  const T* side;
  bool fine;

  explicit Sides(const PixelShuffleAct& a) : side(static_cast<const T*>(a.side)), fine(a.fine_side) {}

  template <class Access>
  inline __attribute__((always_inline)) typename Access::All of(const Access& access, const ShufflePlace& at,
                                                                const typename Access::All& values) const {
    typename Access::All sides;
    for (int k = 0; k < values.count; ++k) sides.v[k] = values.v[k];
    if (side && fine) {
      const auto found = access.fine(side, at);
      for (int k = 0; k < values.count; ++k) sides.v[k] = found.v[k];
    } else if (side) {
      const auto found = access.coarse(side, at);
      for (int k = 0; k < values.count; ++k) sides.v[k] = found.v[k];
    }
    return sides;
  }
};

template <class T> void shuffle_forward(const PixelShuffleAct& a, const void* x, void* y) {
  const T* from = static_cast<const T*>(x);
  T* to = static_cast<T*>(y);
  const Slopes<T> act(a);
  const Sides<T> side(a);
  walk<T>(a, nullptr, [=](const auto& access, const ShufflePlace& at, vec_t<T> slope) __attribute__((always_inline)) {
    auto values = access.coarse(from, at);
    const auto sides = side.of(access, at, values);
    for (int k = 0; k < values.count; ++k) values.v[k] = act.apply(sides.v[k], values.v[k], slope);
    access.fine(to, at, values);
    return vec_t<T>{};
  });
}

template <class T>
void shuffle_backward(const PixelShuffleAct& a, const void* grad_y, const void* x, void* grad_x, void* grad_weight) {
  const T *from = static_cast<const T*>(grad_y), *factor = static_cast<const T*>(x);
  T* to = static_cast<T*>(grad_x);
  const Slopes<T> act(a);
  const Sides<T> side(a);
  walk<T>(a, grad_weight, [=](const auto& access, const ShufflePlace& at, vec_t<T> slope) __attribute__((always_inline)) {
    auto values = access.fine(from, at);
    const auto sides = side.of(access, at, values);
    vec_t<T> sum = {};
    if (grad_weight) {
      const auto factors = factor == side.side ? sides : access.coarse(factor, at);
      for (int k = 0; k < values.count; ++k) sum += keep(~act.above(sides.v[k]), values.v[k] * factors.v[k]);
    }
    if (to) {
      for (int k = 0; k < values.count; ++k) values.v[k] = act.apply(sides.v[k], values.v[k], slope);
      access.coarse(to, at, values);
    }
    return sum;
  });
}

void pixel_shuffle_act_forward(const PixelShuffleAct& a, const void* x, void* y) {
  FASTGAN_BY_DTYPE(shuffle_forward, (a, x, y), a.dtype)
}
void pixel_shuffle_act_backward(const PixelShuffleAct& a, const void* grad_y, const void* x, void* grad_x,
                                void* grad_weight) {
  FASTGAN_BY_DTYPE(shuffle_backward, (a, grad_y, x, grad_x, grad_weight), a.dtype)
}
