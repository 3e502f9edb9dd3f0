// y = act((x - mean) · scale + bias + residual), scale = weight / sqrt(var + eps), and its first and second derivatives,
// where mean and var are those of a channel of the batch, or of a group of channels of one sample.
// With t = x - mean (the mean as rounded to acc; what rounding took is made good in the coefficients), g = act'(pre) · grad_y, v = ggx and u = ggr:
//   backward          grad_x   = k1·g + k2·t + k3                    from the sums of g, g·t
//   double backward   g_grad_y = act'(pre) · (a1·v + a2·t + a3 + u)  from the sums of g, g·t, v, v·t, v·g
//                     g_x      = c1·v + c2·g + c3·t + c4

template <class T> void forward(const NormActForward& a) {
  using Acc = acc_t<T>;
  const Activation<T> act(a);
  const Affine<Acc> affine(a);
  const Slices& slices = affine.slices;
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  auto value = [&](const Channel<T, 4>& channel, int64_t offset, int n) __attribute__((always_inline)) {
    return act.value(preactivation<T, 4>(a, channel, load(x + offset, n) - channel.p[0], offset, n), channel.p[3]);
  };
  if (!a.batch_stats) {
    const Table<Acc> table(4, slices.count);
    affine.fill(table);
    const bool streams = exceeds_caches<T>(2 * a.N * a.C * a.S);
    return for_all<T, 4>(a, table, [&](const Channel<T, 4>& channel, int64_t offset, int n) __attribute__((always_inline)) {
      store_or_stream(y + offset, value(channel, offset, n), n, streams);
    });
  }
  const int64_t ahead = slices.group * a.S; // the next unit: its way from memory overlaps the stores of this one
  auto body = [&](vec_t<T>*, const Channel<T, 4>& channel, int64_t offset, int n, auto where) __attribute__((always_inline)) {
    const vec_t<T> here = value(channel, offset, n);
    __builtin_prefetch(x + offset + ahead, 0, 2);
    slices.fetch_next_to_store(y + offset, where);
    store(y + offset, here, n);
  };
  moments_finish_apply<T, 4>(a, Stored<T>{x}, affine, body);
}

template <class T, bool Prelu> void backward(const NormActBackward& a) {
  using Acc = acc_t<T>;
  using vec = vec_t<T>;
  const Activation<T> act(a);
  const Affine<Acc> affine(a);
  const Slices& slices = affine.slices;
  const Scratch<double> grad_weights(slices.count), grad_biases(slices.count), grad_slopes(slices.count); // of each slice
  const T *x = static_cast<const T*>(a.x), *grad_y = static_cast<const T*>(a.grad_y);
  T *grad_x = static_cast<T*>(a.grad_x), *grad_residual = static_cast<T*>(a.grad_residual);
  auto sums_of = [&](vec* sums, const Channel<T, 4>& channel, int64_t offset, int n, auto where) __attribute__((always_inline)) {
    slices.fetch_next(x + offset, where);
    slices.fetch_next(grad_y + offset, where);
    const vec t = load(x + offset, n) - channel.p[0];
    const vec pre = preactivation<T, 4>(a, channel, t, offset, n), of_y = load(grad_y + offset, n);
    const vec g = act.gradient(pre, of_y, channel.p[3]);
    sums[0] += g;
    sums[1] += g * t;
    if constexpr (Prelu) sums[2] += keep(act.below(pre), of_y * pre);
  };
  const double each = 1 / slices.unit_size();
  auto finish = [&](const Table<Acc>& table, int64_t unit, int64_t channel, auto group, const Sums& sums)
                    __attribute__((always_inline)) {
    const double r = inverse_deviation(a, unit), rest = mean_remainder<Acc>(a, unit);
    const int64_t first = unit * group;
    double h = 0, hx = 0; // means over the unit of weight·g and weight·g·x̂
    for (int64_t i = 0; i < group; ++i) {
      const double g = sums(i, 0), gx = (sums(i, 1) - rest * g) * r, w = affine.weight[channel + i] * each;
      grad_weights[first + i] = gx;
      grad_biases[first + i] = g;
      if (Prelu) grad_slopes[first + i] = sums(i, 2);
      h += w * g;
      hx += w * gx;
    }
    const double k2 = a.batch_stats ? -r * r * hx : 0, k3 = a.batch_stats ? -r * h - k2 * rest : 0;
    for (int64_t i = 0; i < group; ++i) table.store(4, first + i, {affine.weight[channel + i] * r, k2, k3});
  };
  auto body = [&](vec_t<T>*, const Channel<T, 7>& channel, int64_t offset, int n, auto where) __attribute__((always_inline)) {
    if (grad_x) slices.fetch_next_to_store(grad_x + offset, where);
    const vec t = load(x + offset, n) - channel.p[0];
    const vec g = act.gradient(preactivation<T, 7>(a, channel, t, offset, n), load(grad_y + offset, n), channel.p[3]);
    // Outside batch statistics x has no part in it: a nan there must not spread by 0 · nan.
    if (grad_x) store(grad_x + offset, a.batch_stats ? channel.p[4] * g + channel.p[5] * t + channel.p[6] : channel.p[4] * g, n);
    if (grad_residual) store(grad_residual + offset, g, n);
  };
  if (!(a.grad_weight || a.grad_bias || a.grad_prelu_weight || (a.batch_stats && a.grad_x))) {
    const Table<Acc> table(7, slices.count);
    affine.fill(table);
    for (int64_t c = 0; a.grad_x && c < a.C; ++c) table.store(4, c, {affine.weight[c] * inverse_deviation(a, c), 0, 0});
    return for_all<T, 7>(a, table, [&](const Channel<T, 7>& channel, int64_t offset, int n) __attribute__((always_inline)) {
      body(nullptr, channel, offset, n, OnePixel{});
    });
  }
  sum_finish_apply<T, 4, Prelu ? 3 : 2, 7>(a, affine, sums_of, finish, body);
  const auto add_samples = [&](const Scratch<double>& of_slices, void* grad) {
    add_rows<Acc>(of_slices.data, slices.samples, slices.C, slices.C, grad);
  };
  add_samples(grad_weights, a.grad_weight);
  add_samples(grad_biases, a.grad_bias);
  if (Prelu) add_samples(grad_slopes, a.grad_prelu_weight);
}

template <class T> void double_backward(const NormActDoubleBackward& a) {
  using Acc = acc_t<T>;
  using vec = vec_t<T>;
  const Activation<T> act(a);
  const Affine<Acc> affine(a);
  const Slices& slices = affine.slices;
  const Scratch<double> g_weights(slices.count); // of each slice
  const T *x = static_cast<const T*>(a.x), *grad_y = static_cast<const T*>(a.grad_y);
  const T *ggx = static_cast<const T*>(a.ggx), *ggr = static_cast<const T*>(a.ggr);
  T *g_grad_y = static_cast<T*>(a.g_grad_y), *g_x = static_cast<T*>(a.g_x);
  auto sums_of = [&](vec* sums, const Channel<T, 4>& channel, int64_t offset, int n, auto where) __attribute__((always_inline)) {
    slices.fetch_next(x + offset, where);
    slices.fetch_next(grad_y + offset, where);
    const vec t = load(x + offset, n) - channel.p[0];
    const vec g = act.gradient(preactivation<T, 4>(a, channel, t, offset, n), load(grad_y + offset, n), channel.p[3]);
    sums[0] += g;
    sums[1] += g * t;
    if (!ggx) return;
    slices.fetch_next(ggx + offset, where);
    const vec v = load(ggx + offset, n);
    sums[2] += v;
    sums[3] += v * t;
    sums[4] += v * g;
  };
  const Elements<Acc> ggws(a.ggw, a.C, 0), ggbs(a.ggb, a.C, 0);
  const double each = a.batch_stats ? 1 / slices.unit_size() : 0; // given statistics do not move with x
  auto finish = [&](const Table<Acc>& table, int64_t unit, int64_t channel, auto group, const Sums& sums)
                    __attribute__((always_inline)) {
    const double r = inverse_deviation(a, unit), rest = mean_remainder<Acc>(a, unit);
    const int64_t first = unit * group;
    Means mean;
    for (int64_t i = 0; i < group; ++i) {
      const double w = affine.weight[channel + i] * each, ggw = ggws[channel + i] * each;
      const double g = sums(i, 0), gx = (sums(i, 1) - rest * g) * r, v = sums(i, 2);
      mean.h += w * g;
      mean.hx += w * gx;
      mean.v += each * v;
      mean.vx += each * ((sums(i, 3) - rest * v) * r);
      mean.vh += w * sums(i, 4);
      mean.m += ggw * g;
      mean.mx += ggw * gx;
    }
    const double c1 = -r * r * mean.hx, c3 = -r * r * (mean.zx(r) + r * mean.K()), c4 = -r * mean.z(r) - c3 * rest;
    for (int64_t i = 0; i < group; ++i) {
      const double w = affine.weight[channel + i], ggw = ggws[channel + i];
      const double g = sums(i, 0), gx = (sums(i, 1) - rest * g) * r;
      const double a2 = ggw - w * r * mean.vx, a3 = ggbs[channel + i] - w * r * mean.v;
      g_weights[first + i] = r * (a.batch_stats ? sums(i, 4) - mean.v * g - mean.vx * gx : sums(i, 4));
      table.store(4, first + i, {w * r, a2 * r, a3 - a2 * r * rest, c1, r * a2, c3, c4});
    }
  };
  auto body = [&](vec_t<T>* sums, const Channel<T, 11>& channel, int64_t offset, int n, auto where) __attribute__((always_inline)) {
    slices.fetch_next_to_store(g_grad_y + offset, where);
    slices.fetch_next_to_store(g_x + offset, where);
    const auto& p = channel.p;
    const vec t = load(x + offset, n) - p[0], zero = {};
    const vec pre = preactivation<T, 11>(a, channel, t, offset, n);
    const vec of_y = load(grad_y + offset, n), g = act.gradient(pre, of_y, p[3]);
    const vec v = ggx ? load(ggx + offset, n) : zero;
    vec toward = p[4] * v + p[6];
    if (a.batch_stats || a.ggw) toward += p[5] * t;
    if (ggr) toward += load(ggr + offset, n);
    if (a.g_prelu_weight) sums[0] += keep(act.below(pre), of_y * toward);
    store(g_grad_y + offset, act.gradient(pre, toward, p[3]), n);
    store(g_x + offset, a.batch_stats ? p[7] * v + p[8] * g + p[9] * t + p[10] : p[8] * g, n);
  };
  sum_finish_apply<T, 4, 5, 11, 1>(a, affine, sums_of, finish, body, &a.g_prelu_weight);
  add_rows<Acc>(g_weights.data, slices.samples, slices.C, slices.C, a.g_weight);
}

void batch_norm_act_forward(const NormActForward& a) { FASTGAN_BY_DTYPE(forward, (a), a.dtype) }
template <class T> void backward(const NormActBackward& a) {
  a.act == Act::prelu ? backward<T, true>(a) : backward<T, false>(a);
}
void batch_norm_act_backward(const NormActBackward& a) { FASTGAN_BY_DTYPE(backward, (a), a.dtype) }
void batch_norm_act_double_backward(const NormActDoubleBackward& a) { FASTGAN_BY_DTYPE(double_backward, (a), a.dtype) }
