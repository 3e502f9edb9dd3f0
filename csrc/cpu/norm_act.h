// y = act((x - mean) · scale + bias + residual), scale = weight / sqrt(var + eps), and its first and second derivatives.
//
// Every order has one shape: sums per channel over blocks of a fixed size, a finish per channel that merges the blocks in
// order (so the bits do not depend on the number of threads), and one elementwise pass with per-channel coefficients.
// With t = x - mean (the mean as rounded to acc; what rounding took is made good in the coefficients), g = act'(pre) · grad_y, v = ggx and u = ggr:
//   backward          grad_x   = k1·g + k2·t + k3                    from the sums of g, g·t
//   double backward   g_grad_y = act'(pre) · (a1·v + a2·t + a3 + u)  from the sums of g, g·t, v, v·t, v·g
//                     g_x      = c1·v + c2·g + c3·t + c4

constexpr int unroll = 4; // independent accumulators, to cover the latency of an addition
constexpr int run = 64;   // additions to one accumulator before a double takes over: long float32 sums lose digits

template <class T> struct Activation {
  using vec = vec_t<T>;
  using mask = typename Lanes<acc_t<T>>::mask;
  vec slope;
  mask rectify; // all ones for relu, whose negative side is 0 whatever comes in

  explicit Activation(const NormAct& a)
      : slope(broadcast<acc_t<T>>(a.act == Act::none ? 1 : a.act == Act::relu ? 0 : a.negative_slope)),
        rectify(mask{} - (a.act == Act::relu)) {}

  inline __attribute__((always_inline)) vec value(vec pre) const {
    return pre <= 0 ? keep(~rectify, pre * slope) : pre;
  }
  // torch's conventions at NaN: relu passes the gradient, leaky_relu multiplies it by the slope.
  inline __attribute__((always_inline)) vec gradient(vec pre, vec g) const {
    const mask below = (pre <= 0) | ((pre != pre) & ~rectify);
    return below ? keep(~rectify, g * slope) : g;
  }
};

// Per-channel numbers: a table of P rows of C, of which a kernel holds one vector each.
template <class T, int P> struct Channel {
  vec_t<T> p[P ? P : 1];
};

// Memory (N, C, S). A block is some images of one channel, or a piece of one large plane.
struct Planes {
  static constexpr int64_t block_elements = 8192;
  int64_t N, C, S, piece, pieces, images, blocks;

  explicit Planes(const NormAct& a) : N(a.N), C(a.C), S(a.S) {
    piece = smaller(S, block_elements);
    pieces = ceil_div(S, larger(piece, 1));
    images = larger(1, block_elements / larger(S, 1));
    blocks = ceil_div(N, images) * pieces;
  }
  int64_t count(int64_t b) const {
    const int64_t n = b / pieces * images, s = b % pieces * piece;
    return (smaller(n + images, N) - n) * (smaller(s + piece, S) - s);
  }

  // f(sums, channel, offset, n) for every vector of block b of channel c; then flush(k, sum).
  template <class T, int P, int K, class F, class Flush>
  inline __attribute__((always_inline)) void walk(const acc_t<T>* table, int64_t stride, int64_t c, int64_t b, F f,
                                                  Flush flush) const {
    constexpr int W = lanes<acc_t<T>>;
    Channel<T, P> channel;
    for (int i = 0; i < P; ++i) channel.p[i] = broadcast<acc_t<T>>(table[i * stride]);
    doubles<acc_t<T>> totals[K ? K : 1] = {};
    const int64_t n0 = b / pieces * images, n1 = smaller(n0 + images, N), s = b % pieces * piece;
    const int64_t length = smaller(s + piece, S) - s, segment = run * unroll * W;
    const int64_t together = larger(1, run / (length / (unroll * W) + unroll)); // small planes that share accumulators
    for (int64_t image = n0; image < n1; image += together)
      for (int64_t first = 0; first < length; first += segment) {
        vec_t<T> sums[unroll][K ? K : 1] = {};
        const int64_t last = smaller(first + segment, length);
        for (int64_t n = image; n < smaller(image + together, n1); ++n) {
          const int64_t offset = (n * C + c) * S + s;
          int64_t i = first;
          for (; i + unroll * W <= last; i += unroll * W)
            for (int u = 0; u < unroll; ++u) f(sums[u], channel, offset + i + u * W, W);
          for (; i + W <= last; i += W) f(sums[0], channel, offset + i, W);
          if (i < last) f(sums[0], channel, offset + i, static_cast<int>(last - i));
        }
        for (int k = 0; k < K; ++k) {
          const vec_t<T> all = (sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k]);
          totals[k] += __builtin_convertvector(all, doubles<acc_t<T>>);
        }
      }
    for (int k = 0; k < K; ++k) flush(k, sum<acc_t<T>>(totals[k]));
  }
};

// Memory (N·S, C). A block is some rows of all channels.
struct Rows {
  // Few enough blocks that merging them is cheap, small enough ones that the second pass over a block finds it in the L2.
  static constexpr int64_t block_elements = 8192, most_blocks = 128;
  int64_t M, C, height, blocks;

  explicit Rows(const NormAct& a) : M(a.N * a.S), C(a.C) {
    height = larger(larger(unroll, block_elements / larger(C, 1)), ceil_div(M, most_blocks));
    blocks = ceil_div(M, height);
  }
  int64_t count(int64_t b) const { return smaller((b + 1) * height, M) - b * height; }

  // f(sums, channel, offset, n) for every vector of block b; then flush(k, c, sums, n) for every vector of channels.
  template <class T, int P, int K, class F, class Flush>
  inline __attribute__((always_inline)) void walk(const acc_t<T>* table, int64_t stride, int64_t b, F f,
                                                  Flush flush) const {
    constexpr int W = lanes<acc_t<T>>;
    int64_t c = 0;
    for (; c + unroll * W <= C; c += unroll * W) columns<T, P, K, unroll>(table, stride, b, c, W, f, flush);
    for (; c + W <= C; c += W) columns<T, P, K, 1>(table, stride, b, c, W, f, flush);
    if (c < C) columns<T, P, K, 1>(table, stride, b, c, static_cast<int>(C - c), f, flush);
  }

private:
  // `Wide` vectors side by side, in unroll / Wide rows at a time.
  template <class T, int P, int K, int Wide, class F, class Flush>
  inline __attribute__((always_inline)) void columns(const acc_t<T>* table, int64_t stride, int64_t b, int64_t c, int n,
                                                     F f, Flush flush) const {
    constexpr int W = lanes<acc_t<T>>, tall = unroll / Wide;
    Channel<T, P> channel[Wide];
    for (int u = 0; u < Wide; ++u)
      for (int i = 0; i < P; ++i) channel[u].p[i] = load(table + i * stride + c + u * W, n);
    doubles<acc_t<T>> totals[Wide][K ? K : 1] = {};
    const int64_t end = smaller((b + 1) * height, M);
    for (int64_t first = b * height; first < end; first += run * tall) {
      vec_t<T> sums[tall][Wide][K ? K : 1] = {};
      const int64_t last = smaller(first + run * tall, end);
      int64_t r = first;
      for (; r + tall <= last; r += tall)
        for (int v = 0; v < tall; ++v)
          for (int u = 0; u < Wide; ++u) f(sums[v][u], channel[u], (r + v) * C + c + u * W, n);
      for (; r < last; ++r)
        for (int u = 0; u < Wide; ++u) f(sums[0][u], channel[u], r * C + c + u * W, n);
      for (int v = 0; v < tall; ++v)
        for (int u = 0; u < Wide; ++u)
          for (int k = 0; k < K; ++k) totals[u][k] += __builtin_convertvector(sums[v][u][k], doubles<acc_t<T>>);
    }
    for (int u = 0; u < Wide; ++u)
      for (int k = 0; k < K; ++k) flush(k, c + u * W, totals[u][k], n);
  }
};

struct Nothing {
  template <class... A> void operator()(A...) const {}
};

constexpr int64_t channel_group = 64; // channels that Rows merges together, so that merging is vectorised

// The three phases of every order.
//   planes: reduce(c, b), finish(c), apply(c, b);   rows: reduce(b), finish(first channel, count), apply(b)
template <class Reduce, class Finish, class Apply>
void run_planes(const Planes& planes, bool reduces, Reduce reduce, Finish finish, Apply apply) {
  const int64_t C = planes.C, blocks = planes.blocks;
  const bool threads = planes.N * C * planes.S > parallel_threshold;
  if (C >= 2 * omp_get_max_threads()) {
    // A channel whose planes fit in the L2 cache is read from memory once.
#pragma omp parallel for schedule(static) if (threads)
    for (int64_t c = 0; c < C; ++c) {
      if (reduces)
        for (int64_t b = 0; b < blocks; ++b) reduce(c, b);
      finish(c);
      for (int64_t b = 0; b < blocks; ++b) apply(c, b);
    }
    return;
  }
#pragma omp parallel if (threads)
  {
    if (reduces) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < C * blocks; ++i) reduce(i / blocks, i % blocks);
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < C; ++c) finish(c);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < C * blocks; ++i) apply(i / blocks, i % blocks);
  }
}

template <class Reduce, class Finish, class Apply>
void run_rows(const Rows& rows, bool reduces, Reduce reduce, Finish finish, Apply apply) {
#pragma omp parallel if (rows.M * rows.C > parallel_threshold)
  {
    if (reduces) {
#pragma omp for schedule(static)
      for (int64_t b = 0; b < rows.blocks; ++b) reduce(b);
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < rows.C; c += channel_group) finish(c, smaller(channel_group, rows.C - c));
#pragma omp for schedule(static)
    for (int64_t b = 0; b < rows.blocks; ++b) apply(b);
  }
}

// Sums of K products per channel by `reduce_body`, then `finish(c, sums)`, then `apply_body` with the coefficients that
// finish left in `table`: P rows of C, of which the reduction reads the first R.
template <class T, int R, int K, int P, class ReduceBody, class Finish, class ApplyBody>
void sum_finish_apply(const NormAct& a, acc_t<T>* table, bool reduces, ReduceBody reduce_body, Finish finish,
                      ApplyBody apply_body) {
  using Acc = acc_t<T>;
  const int64_t C = a.C;
  auto apply_vector = [&](vec_t<T>*, const Channel<T, P>& channel, int64_t offset, int n) __attribute__((always_inline)) {
    apply_body(channel, offset, n);
  };
  if (a.rows) {
    const Rows rows(a);
    const Scratch<double> partial(reduces ? rows.blocks * K * C : 0);
    run_rows(
        rows, reduces,
        [&](int64_t b) {
          rows.walk<T, R, K>(table, C, b, reduce_body, [&](int k, int64_t c, const doubles<Acc>& totals, int n) {
            __builtin_memcpy(&partial[(b * K + k) * C + c], &totals, n * sizeof(double));
          });
        },
        [&](int64_t first, int64_t count) {
          double totals[K][channel_group] = {};
          if (reduces)
            for (int64_t b = 0; b < rows.blocks; ++b)
              for (int k = 0; k < K; ++k) {
                const double* of_block = &partial[(b * K + k) * C + first];
                for (int64_t i = 0; i < count; ++i) totals[k][i] += of_block[i];
              }
          for (int64_t i = 0; i < count; ++i) {
            double sums[K];
            for (int k = 0; k < K; ++k) sums[k] = totals[k][i];
            finish(first + i, sums);
          }
        },
        [&](int64_t b) { rows.walk<T, P, 0>(table, C, b, apply_vector, Nothing()); });
  } else {
    const Planes planes(a);
    const Scratch<double> partial(reduces ? planes.blocks * K * C : 0);
    run_planes(
        planes, reduces,
        [&](int64_t c, int64_t b) {
          planes.walk<T, R, K>(table + c, C, c, b, reduce_body,
                               [&](int k, double total) { partial[(c * planes.blocks + b) * K + k] = total; });
        },
        [&](int64_t c) {
          double sums[K] = {};
          if (reduces)
            for (int64_t i = 0; i < planes.blocks * K; ++i) sums[i % K] += partial[c * planes.blocks * K + i];
          finish(c, sums);
        },
        [&](int64_t c, int64_t b) { planes.walk<T, P, 0>(table + c, C, c, b, apply_vector, Nothing()); });
  }
}

// Mean and biased variance of every channel into a.mean, a.var, then finish(c) and apply_body. Each block has a mean and
// sums about it, merged in the manner of Chan, Golub and LeVeque (1983): exact for data far from zero.
template <class T, int P, class Finish, class ApplyBody>
void moments_finish_apply(const NormAct& a, acc_t<T>* table, Finish finish, ApplyBody apply_body) {
  using Acc = acc_t<T>;
  using vec = vec_t<T>;
  const int64_t C = a.C;
  const T* x = static_cast<const T*>(a.x);
  auto add = [&](vec* sums, const Channel<T, 0>&, int64_t offset, int n)
      __attribute__((always_inline)) { sums[0] += load(x + offset, n); };
  auto add_about = [&](vec* sums, const Channel<T, 1>& channel, int64_t offset, int n) __attribute__((always_inline)) {
    vec t = load(x + offset, n) - channel.p[0];
    if (n < lanes<Acc>) t = keep(first_lanes<Acc>(n), t);
    sums[0] += t;
    sums[1] += t * t;
  };
  auto apply_vector = [&](vec*, const Channel<T, P>& channel, int64_t offset, int n) __attribute__((always_inline)) {
    apply_body(channel, offset, n);
  };
  // The moments of `count` channels from those of their blocks: for block b a mean as rounded to Acc at rounded[b * stride],
  // and at about[2 * b * stride], `apart` from each other, the sums of the distances to it and of their squares.
  auto merge = [&](const auto& layout, const Acc* rounded, const double* about, int64_t stride, int64_t apart,
                   int64_t first, int64_t count) {
    const double M = static_cast<double>(a.N) * a.S;
    double mean[channel_group] = {}, square[channel_group] = {};
    for (int64_t b = 0; b < layout.blocks; ++b) {
      const double share = layout.count(b) / M;
      for (int64_t i = 0; i < count; ++i) mean[i] += share * rounded[b * stride + i] + about[2 * b * stride + i] / M;
    }
    for (int64_t b = 0; b < layout.blocks; ++b) {
      const double *distances = about + 2 * b * stride, *squares = distances + apart, share = layout.count(b) / M;
      for (int64_t i = 0; i < count; ++i) {
        const double away = rounded[b * stride + i] - mean[i];
        square[i] += squares[i] / M + away * (2 * distances[i] / M + share * away);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      a.mean[first + i] = mean[i];
      a.var[first + i] = square[i] < 0 ? 0 : square[i];
      finish(first + i);
    }
  };
  if (a.rows) {
    const Rows rows(a);
    const Scratch<Acc> rounded(rows.blocks * C);
    const Scratch<double> about(rows.blocks * 2 * C);
    run_rows(
        rows, true,
        [&](int64_t b) {
          const double share = 1.0 / rows.count(b);
          rows.walk<T, 0, 1>(nullptr, 0, b, add, [&](int, int64_t c, const doubles<Acc>& totals, int n) {
            for (int i = 0; i < n; ++i) rounded[b * C + c + i] = static_cast<Acc>(totals[i] * share);
          });
          rows.walk<T, 1, 2>(&rounded[b * C], C, b, add_about,
                             [&](int k, int64_t c, const doubles<Acc>& totals, int n) {
                               __builtin_memcpy(&about[(2 * b + k) * C + c], &totals, n * sizeof(double));
                             });
        },
        [&](int64_t first, int64_t count) {
          merge(rows, &rounded[first], &about[first], C, C, first, count);
        },
        [&](int64_t b) { rows.walk<T, P, 0>(table, C, b, apply_vector, Nothing()); });
  } else {
    const Planes planes(a);
    const int64_t blocks = planes.blocks;
    const Scratch<Acc> rounded(C * blocks);
    const Scratch<double> about(C * blocks * 2);
    run_planes(
        planes, true,
        [&](int64_t c, int64_t b) {
          const int64_t at = c * blocks + b;
          planes.walk<T, 0, 1>(nullptr, 0, c, b, add, [&](int, double total) {
            rounded[at] = static_cast<Acc>(total / planes.count(b));
          });
          planes.walk<T, 1, 2>(&rounded[at], 0, c, b, add_about,
                               [&](int k, double total) { about[2 * at + k] = total; });
        },
        [&](int64_t c) { merge(planes, &rounded[c * blocks], &about[2 * c * blocks], 1, 1, c, 1); },
        [&](int64_t c, int64_t b) { planes.walk<T, P, 0>(table + c, C, c, b, apply_vector, Nothing()); });
  }
}

// Rows 0, 1, 2 of every table: the rounded mean, scale, and bias less what rounding the mean adds. `pre` below is computed
// from them in one way only, so that forward and backward agree on its sign to the bit.
FASTGAN_INLINE double inverse_deviation(const NormAct& a, int64_t c) { return 1 / __builtin_sqrt(a.var[c] + a.eps); }
template <class Acc> double mean_remainder(const NormAct& a, int64_t c) {
  return a.mean[c] - static_cast<Acc>(a.mean[c]);
}
template <class Acc> double channel_weight(const NormAct& a, int64_t c) {
  return a.weight ? static_cast<const Acc*>(a.weight)[c] : 1;
}
template <class Acc> void fill_affine(const NormAct& a, Acc* table, int64_t c) {
  const double scale = channel_weight<Acc>(a, c) * inverse_deviation(a, c);
  const double bias = a.bias ? static_cast<const Acc*>(a.bias)[c] : 0;
  table[c] = static_cast<Acc>(a.mean[c]);
  table[a.C + c] = static_cast<Acc>(scale);
  table[2 * a.C + c] = static_cast<Acc>(bias - mean_remainder<Acc>(a, c) * scale);
}
template <class T, int P>
FASTGAN_INLINE vec_t<T> preactivation(const NormAct& a, const Channel<T, P>& channel, vec_t<T> t, int64_t offset, int n) {
  const vec_t<T> pre = t * channel.p[1] + channel.p[2];
  return a.residual ? pre + load(static_cast<const T*>(a.residual) + offset, n) : pre;
}

template <class T> void forward(const NormActForward& a) {
  using Acc = acc_t<T>;
  const Activation<T> act(a);
  const Scratch<Acc> table(3 * a.C);
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  auto body = [&](const Channel<T, 3>& channel, int64_t offset, int n) __attribute__((always_inline)) {
    const vec_t<T> t = load(x + offset, n) - channel.p[0];
    store(y + offset, act.value(preactivation<T, 3>(a, channel, t, offset, n)), n);
  };
  if (a.batch_stats)
    moments_finish_apply<T, 3>(a, table.data, [&](int64_t c) { fill_affine(a, table.data, c); }, body);
  else
    sum_finish_apply<T, 3, 1, 3>(
        a, table.data, false, [](vec_t<T>*, const Channel<T, 3>&, int64_t, int) {},
        [&](int64_t c, const double*) { fill_affine(a, table.data, c); }, body);
}

template <class T> void backward(const NormActBackward& a) {
  using Acc = acc_t<T>;
  using vec = vec_t<T>;
  const Activation<T> act(a);
  const int64_t C = a.C;
  const Scratch<Acc> table(6 * C);
  for (int64_t c = 0; c < C; ++c) fill_affine(a, table.data, c);
  const T *x = static_cast<const T*>(a.x), *grad_y = static_cast<const T*>(a.grad_y);
  T *grad_x = static_cast<T*>(a.grad_x), *grad_residual = static_cast<T*>(a.grad_residual);
  auto sums_of = [&](vec* sums, const Channel<T, 3>& channel, int64_t offset, int n) __attribute__((always_inline)) {
    const vec t = load(x + offset, n) - channel.p[0];
    const vec g = act.gradient(preactivation<T, 3>(a, channel, t, offset, n), load(grad_y + offset, n));
    sums[0] += g;
    sums[1] += g * t;
  };
  auto finish = [&](int64_t c, const double* sums) {
    const double M = static_cast<double>(a.N) * a.S, r = inverse_deviation(a, c), rest = mean_remainder<Acc>(a, c);
    const double scale = channel_weight<Acc>(a, c) * r, g_sum = sums[0], gx_sum = (sums[1] - rest * g_sum) * r;
    const double k2 = a.batch_stats ? -scale * r * gx_sum / M : 0, k3 = a.batch_stats ? -scale * g_sum / M : 0;
    table[3 * C + c] = static_cast<Acc>(scale);
    table[4 * C + c] = static_cast<Acc>(k2);
    table[5 * C + c] = static_cast<Acc>(k3 - k2 * rest);
    if (a.grad_weight) static_cast<Acc*>(a.grad_weight)[c] = static_cast<Acc>(gx_sum);
    if (a.grad_bias) static_cast<Acc*>(a.grad_bias)[c] = static_cast<Acc>(g_sum);
  };
  auto body = [&](const Channel<T, 6>& channel, int64_t offset, int n) __attribute__((always_inline)) {
    const vec t = load(x + offset, n) - channel.p[0];
    const vec g = act.gradient(preactivation<T, 6>(a, channel, t, offset, n), load(grad_y + offset, n));
    // Outside batch statistics x has no part in it: a nan there must not spread by 0 · nan.
    if (grad_x) store(grad_x + offset, a.batch_stats ? channel.p[3] * g + channel.p[4] * t + channel.p[5] : channel.p[3] * g, n);
    if (grad_residual) store(grad_residual + offset, g, n);
  };
  const bool reduces = a.grad_weight || a.grad_bias || (a.batch_stats && a.grad_x);
  sum_finish_apply<T, 3, 2, 6>(a, table.data, reduces, sums_of, finish, body);
}

template <class T> void double_backward(const NormActDoubleBackward& a) {
  using Acc = acc_t<T>;
  using vec = vec_t<T>;
  const Activation<T> act(a);
  const int64_t C = a.C;
  const Scratch<Acc> table(10 * C);
  for (int64_t c = 0; c < C; ++c) fill_affine(a, table.data, c);
  const T *x = static_cast<const T*>(a.x), *grad_y = static_cast<const T*>(a.grad_y);
  const T *ggx = static_cast<const T*>(a.ggx), *ggr = static_cast<const T*>(a.ggr);
  T *g_grad_y = static_cast<T*>(a.g_grad_y), *g_x = static_cast<T*>(a.g_x);
  auto sums_of = [&](vec* sums, const Channel<T, 3>& channel, int64_t offset, int n) __attribute__((always_inline)) {
    const vec t = load(x + offset, n) - channel.p[0];
    const vec g = act.gradient(preactivation<T, 3>(a, channel, t, offset, n), load(grad_y + offset, n));
    sums[0] += g;
    sums[1] += g * t;
    if (!ggx) return;
    const vec v = load(ggx + offset, n);
    sums[2] += v;
    sums[3] += v * t;
    sums[4] += v * g;
  };
  auto finish = [&](int64_t c, const double* sums) {
    const double M = static_cast<double>(a.N) * a.S, r = inverse_deviation(a, c), rest = mean_remainder<Acc>(a, c);
    const double w = channel_weight<Acc>(a, c);
    const double ggw = a.ggw ? static_cast<const Acc*>(a.ggw)[c] : 0, ggb = a.ggb ? static_cast<const Acc*>(a.ggb)[c] : 0;
    const double g_mean = sums[0] / M, gx = (sums[1] / M - rest * g_mean) * r;
    const double v_mean = sums[2] / M, vx = (sums[3] / M - rest * v_mean) * r;
    const double vg = sums[4] / M, K = vg - v_mean * g_mean - vx * gx;
    double a2 = ggw, a3 = ggb, c1 = 0, c2 = r * ggw, c3 = 0, c4 = 0, g_weight = r * M * vg;
    if (a.batch_stats) {
      a2 = ggw - w * r * vx;
      a3 = ggb - w * r * v_mean;
      c1 = -w * r * r * gx;
      c2 = r * a2;
      c3 = -r * (ggw * gx - 2 * w * r * vx * gx + w * r * K);
      c4 = -c1 * v_mean - c2 * g_mean;
      g_weight = r * M * K;
    }
    const double coefficients[7] = {w * r, a2 * r, a3 - a2 * r * rest, c1, c2, c3 * r, c4 - c3 * r * rest};
    for (int i = 0; i < 7; ++i) table[(3 + i) * C + c] = static_cast<Acc>(coefficients[i]);
    static_cast<Acc*>(a.g_weight)[c] = static_cast<Acc>(g_weight);
  };
  auto body = [&](const Channel<T, 10>& channel, int64_t offset, int n) __attribute__((always_inline)) {
    const auto& p = channel.p;
    const vec t = load(x + offset, n) - p[0], zero = {};
    const vec pre = preactivation<T, 10>(a, channel, t, offset, n);
    const vec g = act.gradient(pre, load(grad_y + offset, n));
    const vec v = ggx ? load(ggx + offset, n) : zero;
    vec toward = p[3] * v + p[5];
    if (a.batch_stats || a.ggw) toward += p[4] * t;
    if (ggr) toward += load(ggr + offset, n);
    store(g_grad_y + offset, act.gradient(pre, toward), n);
    store(g_x + offset, a.batch_stats ? p[6] * v + p[7] * g + p[8] * t + p[9] : p[7] * g, n);
  };
  sum_finish_apply<T, 3, 5, 10>(a, table.data, true, sums_of, finish, body);
}

#define FASTGAN_BY_DTYPE(function, arguments, dtype)                         \
  switch (dtype) {                                                           \
    case DType::float32: return function<float> arguments;                   \
    case DType::float64: return function<double> arguments;                  \
    case DType::bfloat16: return function<bfloat16> arguments;               \
    case DType::float16: return function<float16> arguments;                 \
  }

void batch_norm_act_forward(const NormActForward& a) { FASTGAN_BY_DTYPE(forward, (a), a.dtype) }
void batch_norm_act_backward(const NormActBackward& a) { FASTGAN_BY_DTYPE(backward, (a), a.dtype) }
void batch_norm_act_double_backward(const NormActDoubleBackward& a) { FASTGAN_BY_DTYPE(double_backward, (a), a.dtype) }
