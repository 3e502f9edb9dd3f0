// Per-sample sums and products for gradient penalties: a sample is one row of a matrix (N, S).
//
// The sum of a row is taken in blocks of a fixed size, which are merged in order: the bits do not depend on the number of
// threads.

constexpr int64_t sample_block = 8192;

// sums[n] = Σ x[n]·y[n]
template <class T> void dot(const Samples& a, const void* x, const void* y, void* sums) {
  using Acc = acc_t<T>;
  constexpr int W = lanes<Acc>, segment = run * unroll * W;
  const int64_t blocks = ceil_div(a.S, sample_block);
  const Scratch<double> partial(a.N * blocks);
#pragma omp parallel for schedule(static) if (a.N * a.S > parallel_threshold)
  for (int64_t b = 0; b < a.N * blocks; ++b) {
    const int64_t start = b % blocks * sample_block, length = smaller(sample_block, a.S - start);
    const T* px = static_cast<const T*>(x) + b / blocks * a.S + start;
    const T* py = static_cast<const T*>(y) + b / blocks * a.S + start;
    Doubles<Acc> total = {};
    for (int64_t first = 0; first < length; first += segment) {
      const int64_t last = smaller(first + segment, length);
      vec_t<T> parts[unroll] = {};
      int64_t i = first;
      for (; i + unroll * W <= last; i += unroll * W)
        for (int u = 0; u < unroll; ++u) parts[u] += load(px + i + u * W) * load(py + i + u * W);
      for (; i < last; i += W) {
        const int n = static_cast<int>(smaller(W, last - i));
        parts[0] += load(px + i, n) * load(py + i, n);
      }
      total += Doubles<Acc>::of((parts[0] + parts[1]) + (parts[2] + parts[3]));
    }
    partial[b] = sum<Acc>(total);
  }
  for (int64_t n = 0; n < a.N; ++n) {
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b) total += partial[n * blocks + b];
    static_cast<Acc*>(sums)[n] = static_cast<Acc>(total);
  }
}

// y[n] = factors[n]·x[n]
template <class T> void scale(const Samples& a, const void* x, const void* factors, void* y) {
  using Acc = acc_t<T>;
  constexpr int W = lanes<Acc>;
  const int64_t blocks = ceil_div(a.S, sample_block);
#pragma omp parallel for schedule(static) if (a.N * a.S > parallel_threshold)
  for (int64_t b = 0; b < a.N * blocks; ++b) {
    const int64_t n = b / blocks, first = b % blocks * sample_block, last = smaller(first + sample_block, a.S);
    const T* from = static_cast<const T*>(x) + n * a.S;
    T* to = static_cast<T*>(y) + n * a.S;
    const vec_t<T> factor = broadcast<Acc>(static_cast<const Acc*>(factors)[n]);
    for (int64_t i = first; i < last; i += W) {
      const int count = static_cast<int>(smaller(W, last - i));
      store(to + i, factor * load(from + i, count), count);
    }
  }
}

void sample_dot(const Samples& a, const void* x, const void* y, void* sums) {
  FASTGAN_BY_DTYPE(dot, (a, x, y, sums), a.dtype)
}
void sample_scale(const Samples& a, const void* x, const void* factors, void* y) {
  FASTGAN_BY_DTYPE(scale, (a, x, factors, y), a.dtype)
}
