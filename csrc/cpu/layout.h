// From NCHW to channels_last and back: N matrices of A rows and B columns, each turned into one of B rows and A columns.

// As many elements as a vector has lanes, as bits in these lanes. Nothing is computed with them.
template <class Acc> struct Whole {
  static typename Lanes<Acc>::vec read(const Acc* p, int n) { return load(p, n); }
  static void write(Acc* p, typename Lanes<Acc>::vec v, int n) { store(p, v, n); }
};
struct Half {
  static f32v read(const uint16_t* p, int n) {
    if (n == lanes<float>) return bits_as<f32v>(read_u16(p));
    uint16_t whole[lanes<float>] = {};
    __builtin_memcpy(whole, p, n * sizeof(uint16_t));
    return bits_as<f32v>(read_u16(whole));
  }
  static void write(uint16_t* p, f32v v, int n) {
    if (n == lanes<float>) return write_u16(p, bits_as<u32v>(v));
    uint16_t whole[lanes<float>];
    write_u16(whole, bits_as<u32v>(v));
    __builtin_memcpy(p, whole, n * sizeof(uint16_t));
  }
};

// Element j of vector i becomes element i of vector j: interleaving each with the one half the vectors on, as often as lanes
// can be halved.
template <class Acc> FASTGAN_INLINE void transpose(typename Lanes<Acc>::vec (&v)[lanes<Acc>]) {
  constexpr int W = lanes<Acc>;
  for (int round = 1; round < W; round *= 2) {
    typename Lanes<Acc>::vec next[W];
    for (int i = 0; i < W / 2; ++i) {
      const Pair<Acc> both = interleave<Acc>({v[i], v[i + W / 2]});
      next[2 * i] = both.a;
      next[2 * i + 1] = both.b;
    }
    for (int i = 0; i < W; ++i) v[i] = next[i];
  }
}

template <class Acc, class Access, class T> void transpose_matrices(const Matrices& m, const T* x, T* y) {
  constexpr int W = lanes<Acc>;
  constexpr int64_t width = 4 * W; // columns that are read on while a cache line of each row is there
  const int64_t A = m.A, B = m.B, strips = ceil_div(B, width);
#pragma omp parallel for collapse(2) schedule(static) if (m.N * A * B > parallel_threshold)
  for (int64_t n = 0; n < m.N; ++n)
    for (int64_t strip = 0; strip < strips; ++strip)
      for (int64_t a = 0; a < A; a += W)
        for (int64_t b = strip * width; b < smaller((strip + 1) * width, B); b += W) {
          const int rows = static_cast<int>(smaller(W, A - a)), columns = static_cast<int>(smaller(W, B - b));
          typename Lanes<Acc>::vec v[W] = {};
          for (int i = 0; i < rows; ++i) v[i] = Access::read(x + (n * A + a + i) * B + b, columns);
          transpose<Acc>(v);
          for (int i = 0; i < columns; ++i) Access::write(y + (n * B + b + i) * A + a, v[i], rows);
        }
}

void transpose_matrices(const Matrices& m, const void* x, void* y) {
  switch (m.dtype) {
    case DType::float32:
      return transpose_matrices<float, Whole<float>>(m, static_cast<const float*>(x), static_cast<float*>(y));
    case DType::float64:
      return transpose_matrices<double, Whole<double>>(m, static_cast<const double*>(x), static_cast<double*>(y));
    case DType::bfloat16:
    case DType::float16:
      return transpose_matrices<float, Half>(m, static_cast<const uint16_t*>(x), static_cast<uint16_t*>(y));
  }
}
