// y = clamp(gain · act(x + bias)) and its first and second derivatives, in one pass each. With u = x + bias,
// s = gain · act'(u) where the clamp lets y through and 0 elsewhere, and v = ggx + ggb:
//   backward          grad_x   = s · grad_y                           grad_bias = Σ grad_x
//   double backward   g_grad_y = s · v,  g_x = gain · act''(u) · v · grad_y  g_bias = Σ g_x
// s of the piecewise linear activations is told by y, and their act'' is zero.

template <class Acc> struct Exponential {
  typename Lanes<Acc>::vec exp, expm1;
};
template <class Acc> struct FloatFormat;
template <> struct FloatFormat<float> {
  static constexpr int mantissa = 23, exponent_bias = 127, exp_terms = 7, log_terms = 7;
  static constexpr float lowest = -104, shift = 0x1.8p23f, ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cf79abcap-20f;
};
template <> struct FloatFormat<double> {
  static constexpr int mantissa = 52, exponent_bias = 1023, exp_terms = 13, log_terms = 16;
  static constexpr double lowest = -746, shift = 0x1.8p52, ln2_high = 0x1.62e42fefp-1, ln2_low = 0x1.473de6af278edp-34;
};

// For x <= 0: e^x = 2^k · e^r with |r| <= ln 2 / 2, where the Taylor series of e^r - 1 needs few terms.
template <class Acc> FASTGAN_INLINE Exponential<Acc> exponential(typename Lanes<Acc>::vec x) {
  using vec = typename Lanes<Acc>::vec;
  using integers = typename Lanes<Acc>::mask;
  using Format = FloatFormat<Acc>;
  const vec lowest = broadcast<Acc>(Format::lowest), shift = broadcast<Acc>(Format::shift);
  x = x < lowest ? lowest : x;
  // Adding the shift leaves round(x / ln 2) in the low bits.
  const vec shifted = x * static_cast<Acc>(1.4426950408889634) + shift, k = shifted - shift;
  const vec r = (x - k * Format::ln2_high) - k * Format::ln2_low;
  vec series = broadcast<Acc>(1);
#pragma GCC unroll 16
  for (int n = Format::exp_terms; n > 1; --n) series = series * (r * (1 / static_cast<Acc>(n))) + 1;
  // 2^k as the product of two powers, as it may be smaller than any normal number.
  const integers exponent = bits_as<integers>(shifted) - bits_as<integers>(shift), half = exponent >> 1;
  const vec power = bits_as<vec>((half + Format::exponent_bias) << Format::mantissa) *
                    bits_as<vec>((exponent - half + Format::exponent_bias) << Format::mantissa);
  const vec rest = r * series * power;
  return {power + rest, rest + (power - 1)};
}

// log(1 + z) for 0 <= z <= 1, as 2·artanh(z / (2 + z)).
template <class Acc> FASTGAN_INLINE typename Lanes<Acc>::vec log1p(typename Lanes<Acc>::vec z) {
  using vec = typename Lanes<Acc>::vec;
  const vec s = z / (z + 2), square = s * s;
  vec series = {};
#pragma GCC unroll 20
  for (int n = FloatFormat<Acc>::log_terms; n >= 0; --n) series = series * square + 1 / static_cast<Acc>(2 * n + 1);
  return 2 * s * series;
}

template <class Acc> struct Smooth {
  typename Lanes<Acc>::vec value, first, second;
};

// act(u), act'(u) and act''(u), with torch's conventions: elu has no second derivative at 0, softplus is u above 20.
template <class Acc> FASTGAN_INLINE Smooth<Acc> smooth(BiasActivation act, typename Lanes<Acc>::vec u) {
  using vec = typename Lanes<Acc>::vec;
  const vec zero = {}, one = broadcast<Acc>(1), distance = u < 0 ? -u : u;
  if (act == BiasActivation::elu || act == BiasActivation::selu) {
    const bool self_normalising = act == BiasActivation::selu;
    const Acc scale = self_normalising ? static_cast<Acc>(1.0507009873554804934193349852946) : 1;
    const Acc alpha = scale * (self_normalising ? static_cast<Acc>(1.6732632423543772848170429916717) : 1);
    const Exponential<Acc> e = exponential<Acc>(u > 0 ? zero : u);
    return {u <= 0 ? alpha * e.expm1 : scale * u, u <= 0 ? alpha * e.exp : zero + scale, u < 0 ? alpha * e.exp : zero};
  }
  if (act == BiasActivation::tanh) {
    const Exponential<Acc> e = exponential<Acc>(-2 * distance);
    const vec sum = 1 + e.exp, positive = -e.expm1 / sum, value = u < 0 ? -positive : positive;
    const vec first = 4 * e.exp / (sum * sum);
    return {value, first, -2 * value * first};
  }
  const vec z = exponential<Acc>(-distance).exp, near = one / (1 + z), far = z / (1 + z);
  const vec sigmoid = u < 0 ? far : near, rest = u < 0 ? near : far, slope = sigmoid * rest;
  if (act == BiasActivation::sigmoid) return {sigmoid, slope, slope * (rest - sigmoid)};
  if (act == BiasActivation::softplus)
    return {u > 20 ? u : (u < 0 ? zero : u) + log1p<Acc>(z), u > 20 ? one : sigmoid, u >= 20 ? zero : slope};
  return {u * sigmoid, sigmoid * (1 + u * rest), slope * (2 + u * (rest - sigmoid))}; // swish
}

// Out of line: a call costs nothing beside an exponential, and the loops around it are many.
template <class T> __attribute__((noinline)) vec_t<T> smooth_value(BiasActivation act, vec_t<T> u) {
  return smooth<acc_t<T>>(act, u).value;
}
template <class T> __attribute__((noinline)) Smooth<acc_t<T>> smooth_derivatives(BiasActivation act, vec_t<T> u) {
  return smooth<acc_t<T>>(act, u);
}

// What a gain and a clamp make of a value, and of a derivative where y, or what the clamp makes y of, is. The clamp stops
// the gradient of a nan as well, as torch's hardtanh does.
template <class T> struct Range {
  using vec = vec_t<T>;
  using mask = typename Lanes<acc_t<T>>::mask;
  vec gain, clamp; // nan, which no number is above: no clamp
  mask unlimited;

  explicit Range(const BiasAct& a)
      : gain(broadcast<acc_t<T>>(a.gain)), clamp(broadcast<acc_t<T>>(a.clamp)), unlimited(clamp != clamp) {}

  inline __attribute__((always_inline)) vec value(vec v) const {
    const vec y = v * gain;
    return y > clamp ? clamp : y < -clamp ? -clamp : y;
  }
  inline __attribute__((always_inline)) vec derivative(vec y, vec g) const {
    return keep(((y < clamp) & (y > -clamp)) | unlimited, g * gain);
  }
};

// linear, relu and lrelu. NaN as in torch: relu passes its gradient, lrelu multiplies it by alpha.
template <class T> struct PiecewiseLinear : Range<T> {
  using vec = vec_t<T>;
  using typename Range<T>::mask;
  vec slope;    // of the negative side
  mask rectify; // all ones for relu, whose negative side is 0 whatever comes in

  explicit PiecewiseLinear(const BiasAct& a)
      : Range<T>(a), slope(broadcast<acc_t<T>>(a.act == BiasActivation::lrelu ? a.alpha : 1)),
        rectify(mask{} - (a.act == BiasActivation::relu)) {}

  inline __attribute__((always_inline)) vec value(vec u) const {
    return Range<T>::value(u <= 0 ? keep(~rectify, u * slope) : u);
  }
  inline __attribute__((always_inline)) vec derivative(vec y, vec g) const {
    const mask below = (y <= 0) | ((y != y) & ~rectify);
    return Range<T>::derivative(y, below ? keep(~rectify, g * slope) : g);
  }
};

FASTGAN_INLINE bool is_smooth(const BiasAct& a) { return a.act > BiasActivation::lrelu; }

// f(sums, channel, offset, n) for every vector, whose channels' elements of the P vectors (C,), 0 for absent ones, are in
// channel.p. What f adds to sums[0] goes to totals (C,), if that is not null.
template <class T, int P, class F>
void pass(const BiasAct& a, const void* const (&vectors)[P], void* totals, F f) {
  using Acc = acc_t<T>;
  const int64_t C = a.C;
  const Scratch<Acc> table(P * C);
  for (int i = 0; i < P; ++i)
    for (int64_t c = 0; c < C; ++c) table[i * C + c] = vectors[i] ? static_cast<const Acc*>(vectors[i])[c] : 0;
  auto body = [&](vec_t<T>* sums, const Channel<T, P>& channel, int64_t offset, int n, auto)
      __attribute__((always_inline)) { f(sums, channel, offset, n); };
  NormAct shape = {};
  shape.N = a.N, shape.C = C, shape.S = a.S;
  if (a.S == 1) {
    const Rows rows(shape);
    const Scratch<double> partial(rows.blocks * C);
#pragma omp parallel for schedule(static) if (rows.threads())
    for (int64_t b = 0; b < rows.blocks; ++b)
      rows.walk<T, P, 1>(table.data, C, 0, b, body, [&](int, int64_t c, const Doubles<Acc>& sums, int n) {
        __builtin_memcpy(&partial[b * C + c], &sums, n * sizeof(double));
      });
    add_rows<Acc>(partial.data, rows.blocks, C, C, totals);
  } else {
    const Planes planes(shape);
    const Scratch<double> partial(planes.blocks * C);
#pragma omp parallel for schedule(static) if (planes.threads())
    for (int64_t i = 0; i < C * planes.blocks; ++i) {
      const int64_t c = i / planes.blocks, b = i % planes.blocks;
      planes.walk<T, P, 1>(table.data + c, C, 0, c, c + 1, b, body,
                           [&](int, int64_t, double sum) { partial[b * C + c] = sum; });
    }
    add_rows<Acc>(partial.data, planes.blocks, C, C, totals);
  }
}

template <class T> void activate(const BiasAct& a, const void* x, void* y) {
  const T* from = static_cast<const T*>(x);
  T* to = static_cast<T*>(y);
  const Range<T> range(a);
  const PiecewiseLinear<T> piecewise(a);
  auto body = [&](vec_t<T>*, const Channel<T, 1>& channel, int64_t i, int n) __attribute__((always_inline)) {
    store(to + i, piecewise.value(load(from + i, n) + channel.p[0]), n);
  };
  auto smooth_body = [&](vec_t<T>*, const Channel<T, 1>& channel, int64_t i, int n) __attribute__((always_inline)) {
    store(to + i, range.value(smooth_value<T>(a.act, load(from + i, n) + channel.p[0])), n);
  };
  is_smooth(a) ? pass<T, 1>(a, {a.bias}, nullptr, smooth_body) : pass<T, 1>(a, {a.bias}, nullptr, body);
}

template <class T>
void activate_backward(const BiasAct& a, const void* grad_y, const void* side, void* grad_x, void* grad_bias) {
  const T *g = static_cast<const T*>(grad_y), *sides = static_cast<const T*>(side);
  T* to = static_cast<T*>(grad_x);
  const Range<T> range(a);
  const PiecewiseLinear<T> piecewise(a);
  auto body = [&](vec_t<T>* sums, const Channel<T, 1>&, int64_t i, int n) __attribute__((always_inline)) {
    const vec_t<T> grad = piecewise.derivative(sides ? load(sides + i, n) : vec_t<T>{}, load(g + i, n));
    sums[0] += grad;
    if (to) store(to + i, grad, n);
  };
  auto smooth_body = [&](vec_t<T>* sums, const Channel<T, 1>& channel, int64_t i, int n) __attribute__((always_inline)) {
    const Smooth<acc_t<T>> f = smooth_derivatives<T>(a.act, load(sides + i, n) + channel.p[0]);
    const vec_t<T> grad = range.derivative(range.gain * f.value, f.first * load(g + i, n));
    sums[0] += grad;
    if (to) store(to + i, grad, n);
  };
  is_smooth(a) ? pass<T, 1>(a, {a.bias}, grad_bias, smooth_body) : pass<T, 1>(a, {nullptr}, grad_bias, body);
}

template <class T>
void activate_double_backward(const BiasAct& a, const void* ggx, const void* ggb, const void* grad_y, const void* side,
                              void* g_grad_y, void* g_x, void* g_bias) {
  const T *gg = static_cast<const T*>(ggx), *g = static_cast<const T*>(grad_y), *sides = static_cast<const T*>(side);
  T *to_grad_y = static_cast<T*>(g_grad_y), *to_x = static_cast<T*>(g_x);
  const Range<T> range(a);
  const PiecewiseLinear<T> piecewise(a);
  auto body = [&](vec_t<T>*, const Channel<T, 1>& channel, int64_t i, int n) __attribute__((always_inline)) {
    const vec_t<T> v = gg ? load(gg + i, n) + channel.p[0] : channel.p[0];
    store(to_grad_y + i, piecewise.derivative(sides ? load(sides + i, n) : vec_t<T>{}, v), n);
  };
  auto smooth_body = [&](vec_t<T>* sums, const Channel<T, 2>& channel, int64_t i, int n) __attribute__((always_inline)) {
    const Smooth<acc_t<T>> f = smooth_derivatives<T>(a.act, load(sides + i, n) + channel.p[0]);
    const vec_t<T> v = gg ? load(gg + i, n) + channel.p[1] : channel.p[1], y = range.gain * f.value;
    const vec_t<T> grad = range.derivative(y, f.second * v * load(g + i, n));
    sums[0] += grad;
    store(to_grad_y + i, range.derivative(y, f.first * v), n);
    if (to_x) store(to_x + i, grad, n);
  };
  is_smooth(a) ? pass<T, 2>(a, {a.bias, ggb}, g_bias, smooth_body) : pass<T, 1>(a, {ggb}, nullptr, body);
}

void bias_act_forward(const BiasAct& a, const void* x, void* y) { FASTGAN_BY_DTYPE(activate, (a, x, y), a.dtype) }
void bias_act_backward(const BiasAct& a, const void* grad_y, const void* side, void* grad_x, void* grad_bias) {
  FASTGAN_BY_DTYPE(activate_backward, (a, grad_y, side, grad_x, grad_bias), a.dtype)
}
void bias_act_double_backward(const BiasAct& a, const void* ggx, const void* ggb, const void* grad_y, const void* side,
                              void* g_grad_y, void* g_x, void* g_bias) {
  FASTGAN_BY_DTYPE(activate_double_backward, (a, ggx, ggb, grad_y, side, g_grad_y, g_x, g_bias), a.dtype)
}
