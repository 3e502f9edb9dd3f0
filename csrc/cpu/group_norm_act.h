// group_norm_act: the engine of norm_act.h where the parameters belong to channels, and here layer norm, whose weight and
// bias have a value for each element of a sample. Then x is N samples of S elements, each a slice of its own, and with
//   x̂ = r·(x - mean),  g = act'(x̂·weight + bias + residual)·grad_y,  h = weight·g,  v = ggx,  P(v) = r·(v - E v - x̂·E[v x̂])
//   backward          grad_x   = P(h) = r·h + k2·t + k3                 grad_weight = Σ g·x̂, grad_bias = Σ g over the samples
//   double backward   g_grad_y = act'·(weight·P(v) + ggw·x̂ + ggb + u)   g_weight    = Σ g·P(v)
//                     g_x      = r·ggw·g + c1·v + c2·h + c3·t + c4
// in the terms of norm_act.h.

// The element that a parameter has for those at offset, or n times `absent`.
template <class T> struct Parameter {
  const acc_t<T>* data;
  acc_t<T> absent;
  Parameter(const void* data, acc_t<T> absent) : data(static_cast<const acc_t<T>*>(data)), absent(absent) {}
  inline __attribute__((always_inline)) vec_t<T> at(int64_t i, int n) const {
    return data ? load(data + i, n) : broadcast<acc_t<T>>(absent);
  }
};

// What is normalised at one place, with rows 0, 1, 2 of the table: the rounded mean, r, and less r times what rounding took.
template <class T> struct Normalised {
  vec_t<T> t, xh, weight, pre;
};
template <class T, int P>
FASTGAN_INLINE Normalised<T> normalised(const NormAct& a, const Channel<T, P>& channel, int64_t offset, int n) {
  const Parameter<T> weight(a.weight, 1), bias(a.bias, 0);
  Normalised<T> at;
  at.t = load(static_cast<const T*>(a.x) + offset, n) - channel.p[0];
  at.xh = at.t * channel.p[1] + channel.p[2];
  at.weight = weight.at(offset - channel.start, n);
  at.pre = at.xh * at.weight + bias.at(offset - channel.start, n);
  if (a.residual) at.pre += load(static_cast<const T*>(a.residual) + offset, n);
  return at;
}
template <class Acc> void fill_scale(const NormAct& a, const Table<Acc>& table, int64_t sample) {
  const double r = inverse_deviation(a, sample);
  table.store(0, sample, {a.mean[sample], r, -r * mean_remainder<Acc>(a, sample)});
}

// body(sums, channel, offset, n) for every vector; what it adds to the K sums goes, for each element over all samples, to
// the arrays `totals`, any of which may be null.
template <class T, int P, int K, class Body>
void apply_and_sum_samples(const NormAct& a, const Table<acc_t<T>>& table, Body body, void* const (&totals)[K]) {
  using Acc = acc_t<T>;
  // A block is a few samples of a page's worth of elements, for which the sums stay in the L1.
  constexpr int64_t width = 4096 / sizeof(Acc), height = run;
  constexpr int W = lanes<Acc>;
  const int64_t N = a.N, S = a.S, across = ceil_div(S, width), down = ceil_div(N, height);
  const bool threads = N * S > parallel_threshold;
  const Scratch<double> partial(down == 1 ? 0 : down * K * S);
#pragma omp parallel if (threads)
  {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < down * across; ++block) {
      const int64_t row = block / across, first = block % across * width, last = smaller(first + width, S);
      Acc sums[K][width] = {};
      for (int64_t sample = row * height; sample < smaller((row + 1) * height, N); ++sample) {
        Channel<T, P> channel;
        channel.start = sample * S;
        for (int i = 0; i < P; ++i) channel.p[i] = broadcast<Acc>(*table.at(i, sample));
        for (int64_t i = first; i < last; i += W) {
          vec_t<T> here[K];
          for (int k = 0; k < K; ++k) here[k] = load(&sums[k][i - first]);
          body(here, channel, channel.start + i, static_cast<int>(smaller(W, last - i)));
          for (int k = 0; k < K; ++k) store(&sums[k][i - first], here[k]);
        }
      }
      for (int k = 0; k < K; ++k) {
        if (down == 1 && totals[k]) __builtin_memcpy(static_cast<Acc*>(totals[k]) + first, sums[k], (last - first) * sizeof(Acc));
        for (int64_t i = first; down > 1 && i < last; ++i) partial[(row * K + k) * S + i] = sums[k][i - first];
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < (down == 1 ? 0 : across * K); ++i) {
      const int64_t k = i / across, first = i % across * width, last = smaller(first + width, S);
      if (!totals[k]) continue;
      for (int64_t row = 1; row < down; ++row)
        for (int64_t j = first; j < last; ++j) partial[k * S + j] += partial[(row * K + k) * S + j];
      for (int64_t j = first; j < last; ++j) static_cast<Acc*>(totals[k])[j] = static_cast<Acc>(partial[k * S + j]);
    }
  }
}

// `sum_finish_apply`, and the sums over the samples where one of `totals` is wanted.
template <class T, int K, int P, int L, class ReduceBody, class Finish, class Body>
void layer_sum_finish_apply(const NormAct& a, ReduceBody reduce_body, Finish finish, Body body, void* const (&totals)[L]) {
  bool sums_samples = false;
  for (void* total : totals) sums_samples = sums_samples || total;
  const Table<acc_t<T>> table(sums_samples ? P : 0, a.N);
  sum_finish_apply<T, 3, K, P>(
      a, [&](const Table<acc_t<T>>& own, int64_t sample, int64_t, auto) { fill_scale(a, own, sample); }, reduce_body,
      [&](const Table<acc_t<T>>& own, int64_t sample, int64_t, auto, const Sums& sums) {
        finish(own, sample, sums);
        for (int i = 0; i < P && sums_samples; ++i) *table.at(i, sample) = *own.at(i, sample);
      },
      [&](vec_t<T>*, const Channel<T, P>& channel, int64_t offset, int n, auto) __attribute__((always_inline)) {
        vec_t<T> unused[L] = {};
        if (!sums_samples) body(unused, channel, offset, n);
      });
  if (sums_samples) apply_and_sum_samples<T, P>(a, table, body, totals);
}

template <class T> void layer_forward(const NormActForward& a) {
  using Acc = acc_t<T>;
  const Activation<T> act(a);
  T* y = static_cast<T*>(a.y);
  moments_finish_apply<T, 3>(
      a, Stored<T>{static_cast<const T*>(a.x)},
      [&](const Table<Acc>& table, int64_t sample, int64_t, auto) { fill_scale(a, table, sample); },
      [&](vec_t<T>*, const Channel<T, 3>& channel, int64_t offset, int n, auto) __attribute__((always_inline)) {
        store(y + offset, act.value(normalised<T, 3>(a, channel, offset, n).pre), n);
      });
}

template <class T> void layer_backward(const NormActBackward& a) {
  using Acc = acc_t<T>;
  using vec = vec_t<T>;
  const Activation<T> act(a);
  const T* grad_y = static_cast<const T*>(a.grad_y);
  T *grad_x = static_cast<T*>(a.grad_x), *grad_residual = static_cast<T*>(a.grad_residual);
  auto sums_of = [&](vec* sums, const Channel<T, 3>& channel, int64_t offset, int n, auto) __attribute__((always_inline)) {
    const auto at = normalised<T, 3>(a, channel, offset, n);
    const vec h = act.gradient(at.pre, load(grad_y + offset, n)) * at.weight;
    sums[0] += h;
    sums[1] += h * at.t;
  };
  auto finish = [&](const Table<Acc>& table, int64_t sample, const Sums& sums) {
    const double r = inverse_deviation(a, sample), rest = mean_remainder<Acc>(a, sample);
    const double h = sums(0, 0) / a.S, hx = (sums(0, 1) / a.S - rest * h) * r, k2 = -r * r * hx;
    table.store(3, sample, {k2, -r * h - k2 * rest});
  };
  auto body = [&](vec* sums, const Channel<T, 5>& channel, int64_t offset, int n) __attribute__((always_inline)) {
    const auto& p = channel.p;
    // Of the next sample: its part of these elements is on other pages.
    __builtin_prefetch(static_cast<const T*>(a.x) + offset + a.S, 0, 2);
    __builtin_prefetch(grad_y + offset + a.S, 0, 2);
    if (grad_x) __builtin_prefetch(grad_x + offset + a.S, 1, 2);
    const auto at = normalised<T, 5>(a, channel, offset, n);
    const vec g = act.gradient(at.pre, load(grad_y + offset, n));
    sums[0] += g * at.xh;
    sums[1] += g;
    if (grad_x) store(grad_x + offset, p[1] * (g * at.weight) + p[3] * at.t + p[4], n);
    if (grad_residual) store(grad_residual + offset, g, n);
  };
  layer_sum_finish_apply<T, 2, 5>(a, sums_of, finish, body, {a.grad_weight, a.grad_bias});
}

template <class T> void layer_double_backward(const NormActDoubleBackward& a) {
  using Acc = acc_t<T>;
  using vec = vec_t<T>;
  const Activation<T> act(a);
  const T* grad_y = static_cast<const T*>(a.grad_y);
  const T *ggx = static_cast<const T*>(a.ggx), *ggr = static_cast<const T*>(a.ggr);
  T *g_grad_y = static_cast<T*>(a.g_grad_y), *g_x = static_cast<T*>(a.g_x);
  const Parameter<T> ggw(a.ggw, 0), ggb(a.ggb, 0);
  auto sums_of = [&](vec* sums, const Channel<T, 3>& channel, int64_t offset, int n, auto) __attribute__((always_inline)) {
    const auto at = normalised<T, 3>(a, channel, offset, n);
    const vec g = act.gradient(at.pre, load(grad_y + offset, n)), h = g * at.weight;
    sums[0] += h;
    sums[1] += h * at.t;
    if (ggw.data) {
      const vec m = g * ggw.at(offset - channel.start, n);
      sums[2] += m;
      sums[3] += m * at.t;
    }
    if (!ggx) return;
    const vec v = load(ggx + offset, n);
    sums[4] += v;
    sums[5] += v * at.t;
    sums[6] += v * h;
  };
  auto finish = [&](const Table<Acc>& table, int64_t sample, const Sums& sums) {
    const double r = inverse_deviation(a, sample), rest = mean_remainder<Acc>(a, sample);
    Means mean;
    mean.h = sums(0, 0) / a.S;
    mean.hx = (sums(0, 1) / a.S - rest * mean.h) * r;
    mean.m = sums(0, 2) / a.S;
    mean.mx = (sums(0, 3) / a.S - rest * mean.m) * r;
    mean.v = sums(0, 4) / a.S;
    mean.vx = (sums(0, 5) / a.S - rest * mean.v) * r;
    mean.vh = sums(0, 6) / a.S;
    const double c1 = -r * r * mean.hx, c2 = -r * r * mean.vx, c3 = -r * r * (mean.zx(r) + r * mean.K());
    table.store(3, sample, {c1, c2, -r * mean.v - c2 * rest, c3, -r * mean.z(r) - c3 * rest});
  };
  auto body = [&](vec* sums, const Channel<T, 8>& channel, int64_t offset, int n) __attribute__((always_inline)) {
    const auto& p = channel.p;
    const int64_t i = offset - channel.start;
    const auto at = normalised<T, 8>(a, channel, offset, n);
    const vec g = act.gradient(at.pre, load(grad_y + offset, n)), zero = {};
    const vec v = ggx ? load(ggx + offset, n) : zero, gw = ggw.at(i, n);
    const vec pv = p[1] * v + p[4] * at.t + p[5];
    sums[0] += g * pv;
    vec toward = at.weight * pv + gw * at.xh + ggb.at(i, n);
    if (ggr) toward += load(ggr + offset, n);
    store(g_grad_y + offset, act.gradient(at.pre, toward), n);
    store(g_x + offset, p[3] * v + (p[1] * gw + p[4] * at.weight) * g + p[6] * at.t + p[7], n);
  };
  layer_sum_finish_apply<T, 7, 8>(a, sums_of, finish, body, {a.g_weight});
}

void group_norm_act_forward(const NormActForward& a) {
  if (a.per_element) FASTGAN_BY_DTYPE(layer_forward, (a), a.dtype)
  FASTGAN_BY_DTYPE(forward, (a), a.dtype)
}
void group_norm_act_backward(const NormActBackward& a) {
  if (a.per_element) FASTGAN_BY_DTYPE(layer_backward, (a), a.dtype)
  FASTGAN_BY_DTYPE(backward, (a), a.dtype)
}
void group_norm_act_double_backward(const NormActDoubleBackward& a) {
  if (a.per_element) FASTGAN_BY_DTYPE(layer_double_backward, (a), a.dtype)
  FASTGAN_BY_DTYPE(double_backward, (a), a.dtype)
}
