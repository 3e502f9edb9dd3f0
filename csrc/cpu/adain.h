// adain: the engine of slices.h for planes whose values are y = act(p), p = x + noise_weight·noise + bias, and whose scale
// and shift belong to a channel of one sample. With t = y - mean, r = 1 / sqrt(var + eps), ŷ = r·t, m = act'(p) and
// P(v) = r·(v - E v - ŷ·E[v ŷ]):
//   forward           out    = scale·ŷ + shift
//   backward          grad_x = m·scale·P(g)          grad_scale = Σ g·ŷ, grad_shift = Σ g over the plane
//                     grad_bias = Σ grad_x, grad_noise_weight = Σ noise·grad_x over the planes of a channel
//   double backward   of <v, grad_x> + <ggs, grad_scale> + <ggt, grad_shift> + <ggb, grad_bias> + <ggn, grad_noise_weight>,
//                     with u = m·(v + ggb + ggn·noise): instance norm's, for ggx = u, ggw = ggs and ggb = ggt, and then as
//                     in the backward: g_x = m·g_y, g_bias = Σ g_x, g_noise_weight = Σ noise·g_x

template <class T> FASTGAN_INLINE vec_t<T> noise_at(const AdaIN& a, Pixels where, int n) {
  return load(static_cast<const acc_t<T>*>(a.noise) + where.first, n);
}
template <class T> FASTGAN_INLINE vec_t<T> noise_at(const AdaIN& a, OnePixel where, int) {
  return broadcast<acc_t<T>>(static_cast<const acc_t<T>*>(a.noise)[where.index]);
}

// v, and 0 in the lanes past n.
template <class T> FASTGAN_INLINE vec_t<T> first_of(vec_t<T> v, int n) {
  return n < lanes<acc_t<T>> ? keep(first_lanes<acc_t<T>>(n), v) : v;
}

// y at a place. Its two numbers, bias and noise_weight, are rows 0 and 1 of every table. `Plain`: without noise, bias and
// activation, where y is x.
template <class T, bool Plain> struct Activated {
  using element = T;
  static constexpr int P = 2;
  const AdaIN& a;
  Activation<T> act;
  Elements<acc_t<T>> bias, noise_weight;

  explicit Activated(const AdaIN& a) : a(a), act(a), bias(a.bias, a.C, 0), noise_weight(a.noise_weight, a.C, 1) {}
  inline __attribute__((always_inline)) void fill(const Table<acc_t<T>>& table, int64_t row, int64_t slice, int64_t channel) const {
    table.store(row, slice, {bias[channel], noise_weight[channel]});
  }
  // Computed in one way only, so that forward and backward agree on its sign to the bit.
  template <class Where>
  inline __attribute__((always_inline)) vec_t<T> before(const vec_t<T>* p, int64_t offset, int n, Where where) const {
    const vec_t<T> x = load(static_cast<const T*>(a.x) + offset, n);
    if constexpr (Plain)
      return x;
    else
      return a.noise ? x + p[0] + p[1] * noise_at<T>(a, where, n) : x + p[0];
  }
  // act(p) = act'(p)·p, which is slower. (GCC 12 fails on `act.value` beside `act.gradient` where there is only SSE2.)
  inline __attribute__((always_inline)) vec_t<T> after(vec_t<T> before) const {
    if constexpr (Plain)
      return before;
    else if constexpr (FASTGAN_VECTOR_BYTES > 16)
      return act.value(before);
    else
      return act.gradient(before, before);
  }
  template <class Where>
  inline __attribute__((always_inline)) vec_t<T> operator()(const vec_t<T>* p, int64_t offset, int n, Where where) const {
    return after(before(p, offset, n, where));
  }
  inline __attribute__((always_inline)) vec_t<T> gradient(vec_t<T> before, vec_t<T> g) const {
    if constexpr (Plain)
      return g;
    else
      return act.gradient(before, g);
  }
  // Adds to the sums of a channel, as many as `sums_of_channel`, what is left of a gradient that has come to x.
  static constexpr int sums_of_channel = Plain ? 0 : 2;
  template <class Where>
  inline __attribute__((always_inline)) void add(vec_t<T>* sums, vec_t<T> grad_x, int n, Where where) const {
    if constexpr (!Plain) {
      grad_x = first_of<T>(grad_x, n);
      sums[0] += grad_x;
      if (a.noise) sums[1] += grad_x * noise_at<T>(a, where, n);
    }
  }
};

template <class Values> void adain_forward_of(const AdaINForward& a, const Values& values) {
  using T = typename Values::element;
  using Acc = acc_t<T>;
  const Slices slices(a);
  T* out = static_cast<T*>(a.out);
  const Elements<Acc> scales(a.scale, slices.count, 1), shifts(a.shift, slices.count, 0);
  auto finish = [&](const Table<Acc>& table, int64_t slice, int64_t channel, auto) __attribute__((always_inline)) {
    const double scale = scales[slice] * inverse_deviation(a, slice);
    values.fill(table, 0, slice, channel);
    table.store(2, slice, {a.mean[slice], scale, shifts[slice] - mean_remainder<Acc>(a, slice) * scale});
  };
  auto body = [&](vec_t<T>*, const Channel<T, 5>& channel, int64_t offset, int n, auto where) __attribute__((always_inline)) {
    const auto& p = channel.p;
    slices.fetch_next(static_cast<const T*>(a.x) + offset, where);
    slices.fetch_next_to_store(out + offset, where);
    store(out + offset, (values(p, offset, n, where) - p[2]) * p[3] + p[4], n);
  };
  moments_finish_apply<T, 5>(a, values, finish, body);
}

template <class Values> void adain_backward_of(const AdaINBackward& a, const Values& values) {
  using T = typename Values::element;
  using Acc = acc_t<T>;
  using vec = vec_t<T>;
  const Slices slices(a);
  const double each = 1 / slices.unit_size();
  auto prepare = [&](const Table<Acc>& table, int64_t slice, int64_t channel, auto) __attribute__((always_inline)) {
    values.fill(table, 0, slice, channel);
    table.store(2, slice, {a.mean[slice]});
  };
  const Elements<Acc> scales(a.scale, slices.count, 1);
  const T* grad_out = static_cast<const T*>(a.grad_out);
  T* grad_x = static_cast<T*>(a.grad_x);
  auto sums_of = [&](vec* sums, const Channel<T, 3>& channel, int64_t offset, int n, auto where) __attribute__((always_inline)) {
    slices.fetch_next(static_cast<const T*>(a.x) + offset, where);
    slices.fetch_next(grad_out + offset, where);
    const vec t = values(channel.p, offset, n, where) - channel.p[2], g = load(grad_out + offset, n);
    sums[0] += g;
    sums[1] += g * t;
  };
  auto finish = [&](const Table<Acc>& table, int64_t slice, int64_t, auto, const Sums& sums)
                    __attribute__((always_inline)) {
    const double r = inverse_deviation(a, slice), rest = mean_remainder<Acc>(a, slice), g = sums(0, 0);
    const double gy = (sums(0, 1) - rest * g) * r, scale = scales[slice], k2 = -scale * r * r * gy * each;
    if (a.grad_scale) static_cast<Acc*>(a.grad_scale)[slice] = static_cast<Acc>(gy);
    if (a.grad_shift) static_cast<Acc*>(a.grad_shift)[slice] = static_cast<Acc>(g);
    table.store(3, slice, {scale * r, k2, -scale * r * g * each - k2 * rest});
  };
  auto body = [&](vec* sums, const Channel<T, 6>& channel, int64_t offset, int n, auto where) __attribute__((always_inline)) {
    if (!grad_x) return;
    const auto& p = channel.p;
    const vec before = values.before(p, offset, n, where), t = values.after(before) - p[2];
    const vec grad = values.gradient(before, p[3] * load(grad_out + offset, n) + p[4] * t + p[5]);
    slices.fetch_next(static_cast<const T*>(a.x) + offset, where);
    slices.fetch_next(grad_out + offset, where);
    slices.fetch_next_to_store(grad_x + offset, where);
    store(grad_x + offset, grad, n);
    values.add(sums, grad, n, where);
  };
  void* const totals[] = {a.grad_bias, a.grad_noise_weight};
  sum_finish_apply<T, 3, 2, 6, Values::sums_of_channel>(a, prepare, sums_of, finish, body, totals);
}

template <class Values> void adain_double_backward_of(const AdaINDoubleBackward& a, const Values& values) {
  using T = typename Values::element;
  using Acc = acc_t<T>;
  using vec = vec_t<T>;
  const Slices slices(a);
  const double each = 1 / slices.unit_size();
  const Elements<Acc> gg_biases(a.gg_bias, a.C, 0), gg_noise_weights(a.gg_noise_weight, a.C, 0);
  auto prepare = [&](const Table<Acc>& table, int64_t slice, int64_t channel, auto) __attribute__((always_inline)) {
    values.fill(table, 0, slice, channel);
    table.store(2, slice, {a.mean[slice], gg_biases[channel], gg_noise_weights[channel]});
  };
  const Elements<Acc> scales(a.scale, slices.count, 1), gg_scales(a.gg_scale, slices.count, 0);
  const Elements<Acc> gg_shifts(a.gg_shift, slices.count, 0);
  const T *grad_out = static_cast<const T*>(a.grad_out), *ggx = static_cast<const T*>(a.ggx);
  T *g_grad_out = static_cast<T*>(a.g_grad_out), *g_x = static_cast<T*>(a.g_x);
  auto tangent = [&](const vec* p, vec before, int64_t offset, int n, auto where) __attribute__((always_inline)) {
    vec u = p[3];
    if (ggx) u += load(ggx + offset, n);
    if (a.noise && a.gg_noise_weight) u += p[4] * noise_at<T>(a, where, n);
    return first_of<T>(values.gradient(before, u), n);
  };
  auto sums_of = [&](vec* sums, const Channel<T, 5>& channel, int64_t offset, int n, auto where) __attribute__((always_inline)) {
    const auto& p = channel.p;
    const vec before = values.before(p, offset, n, where), t = values.after(before) - p[2];
    const vec g = load(grad_out + offset, n), u = tangent(p, before, offset, n, where);
    sums[0] += g;
    sums[1] += g * t;
    sums[2] += u;
    sums[3] += u * t;
    sums[4] += u * g;
  };
  auto finish = [&](const Table<Acc>& table, int64_t slice, int64_t, auto, const Sums& sums)
                    __attribute__((always_inline)) {
    const double r = inverse_deviation(a, slice), rest = mean_remainder<Acc>(a, slice);
    const double scale = scales[slice], ggs = gg_scales[slice];
    const double g = sums(0, 0), gy = (sums(0, 1) - rest * g) * r;
    Means mean;
    mean.h = scale * g * each;
    mean.hx = scale * gy * each;
    mean.v = sums(0, 2) * each;
    mean.vx = (sums(0, 3) - rest * sums(0, 2)) * r * each;
    mean.vh = scale * sums(0, 4) * each;
    mean.m = ggs * g * each;
    mean.mx = ggs * gy * each;
    const double a2 = r * (ggs - scale * r * mean.vx), a3 = gg_shifts[slice] - scale * r * mean.v;
    const double c3 = -r * r * (mean.zx(r) + r * mean.K());
    static_cast<Acc*>(a.g_scale)[slice] = static_cast<Acc>(r * (sums(0, 4) - mean.v * g - mean.vx * gy));
    table.store(5, slice, {scale * r, a2, a3 - a2 * rest, -r * r * mean.hx, a2, c3, -r * mean.z(r) - c3 * rest});
  };
  auto body = [&](vec* sums, const Channel<T, 12>& channel, int64_t offset, int n, auto where) __attribute__((always_inline)) {
    const auto& p = channel.p;
    const vec before = values.before(p, offset, n, where), t = values.after(before) - p[2];
    const vec g = load(grad_out + offset, n), u = tangent(p, before, offset, n, where);
    store(g_grad_out + offset, p[5] * u + p[6] * t + p[7], n);
    const vec grad = values.gradient(before, p[8] * u + p[9] * g + p[10] * t + p[11]);
    store(g_x + offset, grad, n);
    values.add(sums, grad, n, where);
  };
  void* const totals[] = {a.g_bias, a.g_noise_weight};
  sum_finish_apply<T, 5, 5, 12, Values::sums_of_channel>(a, prepare, sums_of, finish, body, totals);
}

template <class T> void plane_statistics_of(const NormAct& a) {
  moments_finish_apply<T, 0>(a, Stored<T>{static_cast<const T*>(a.x)}, Nothing(), Nothing());
}

template <class T> void plane_statistics_backward_of(const PlaneStatisticsBackward& a) {
  using Acc = acc_t<T>;
  const Slices slices(a);
  const Table<Acc> table(3, slices.count);
  const Elements<Acc> slopes(a.slope, slices.count, 0), offsets(a.offset, slices.count, 0);
  for (int64_t slice = 0; slice < slices.count; ++slice) {
    const double slope = slopes[slice];
    table.store(0, slice, {a.mean[slice], slope, offsets[slice] - slope * mean_remainder<Acc>(a, slice)});
  }
  const T* x = static_cast<const T*>(a.x);
  T* grad_x = static_cast<T*>(a.grad_x);
  for_all<T, 3>(a, table, [&](const Channel<T, 3>& channel, int64_t offset, int n) __attribute__((always_inline)) {
    store(grad_x + offset, (load(x + offset, n) - channel.p[0]) * channel.p[1] + channel.p[2], n);
  });
}

// order(values), of the types of which speed is asked with what is plain by itself.
template <class T, class Order> void with_values_of(const AdaIN& a, const Order& order) {
  if constexpr (accumulators<T> > 1)
    if (!a.noise && !a.bias && a.act == Act::none) return order(Activated<T, true>(a));
  order(Activated<T, false>(a));
}
template <class Order> void with_values(const AdaIN& a, const Order& order) {
  FASTGAN_BY_DTYPE(with_values_of, (a, order), a.dtype)
}

void adain_forward(const AdaINForward& a) {
  with_values(a, [&](const auto& values) { adain_forward_of(a, values); });
}
void adain_backward(const AdaINBackward& a) {
  with_values(a, [&](const auto& values) { adain_backward_of(a, values); });
}
void adain_double_backward(const AdaINDoubleBackward& a) {
  with_values(a, [&](const auto& values) { adain_double_backward_of(a, values); });
}
void plane_statistics(const NormAct& a) { FASTGAN_BY_DTYPE(plane_statistics_of, (a), a.dtype) }
void plane_statistics_backward(const PlaneStatisticsBackward& a) {
  FASTGAN_BY_DTYPE(plane_statistics_backward_of, (a), a.dtype)
}
