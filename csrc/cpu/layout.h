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

// Element j of vector i becomes element i of vector j. First in squares within 128 bits, by interleaving each vector of a
// square with the one half the square on, as often as it can be halved; then with these squares as elements, where the even
// ones of two vectors and the odd ones come together instead. Shuffles of no other kind take one instruction everywhere.
template <class Acc> FASTGAN_INLINE void transpose(typename Lanes<Acc>::vec (&v)[lanes<Acc>]) {
  constexpr int W = lanes<Acc>, side = 16 / sizeof(Acc), squares = W / side;
  typename Lanes<Acc>::mask low, even;
  for (int i = 0; i < W; ++i) {
    low[i] = i / side * side + i % side / 2 + i % 2 * W;
    even[i] = 2 * (i / side) * side + i % side;
  }
  for (int round = 1; round < side; round *= 2) {
    typename Lanes<Acc>::vec next[W];
    for (int i = 0; i < W; i += side)
      for (int j = 0; j < side / 2; ++j) {
        const Pair<Acc> both = shuffle<Acc>({v[i + j], v[i + j + side / 2]}, low, low + side / 2);
        next[i + 2 * j] = both.a;
        next[i + 2 * j + 1] = both.b;
      }
    for (int i = 0; i < W; ++i) v[i] = next[i];
  }
  for (int round = 1; round < squares; round *= 2) {
    typename Lanes<Acc>::vec next[W];
    for (int i = 0; i < squares / 2; ++i)
      for (int j = 0; j < side; ++j) {
        const Pair<Acc> both = shuffle<Acc>({v[2 * i * side + j], v[(2 * i + 1) * side + j]}, even, even + side);
        next[i * side + j] = both.a;
        next[(i + squares / 2) * side + j] = both.b;
      }
    for (int i = 0; i < W; ++i) v[i] = next[i];
  }
}

// At most a square of lanes: read(i, columns) gives a row of it, write(j, column, rows) takes a column.
template <class Acc, class Read, class Write>
FASTGAN_INLINE void transpose_tile(int rows, int columns, const Read& read, const Write& write) {
  constexpr int W = lanes<Acc>;
  if (rows > W || columns > W) __builtin_unreachable();
  typename Lanes<Acc>::vec v[W];
  if (rows == W && columns == W) { // all in registers
    for (int i = 0; i < W; ++i) v[i] = read(i, W);
    transpose<Acc>(v);
    for (int j = 0; j < W; ++j) write(j, v[j], W);
  } else {
    for (int i = 0; i < W; ++i) v[i] = i < rows ? read(i, columns) : typename Lanes<Acc>::vec{};
    transpose<Acc>(v);
    for (int j = 0; j < columns; ++j) write(j, v[j], rows);
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
          const T* const from = x + (n * A + a) * B + b;
          T* const to = y + (n * B + b) * A + a;
          transpose_tile<Acc>(
              static_cast<int>(smaller(W, A - a)), static_cast<int>(smaller(W, B - b)),
              [&](int i, int columns) __attribute__((always_inline)) { return Access::read(from + i * B, columns); },
              [&](int j, typename Lanes<Acc>::vec v, int rows) __attribute__((always_inline)) { Access::write(to + j * A, v, rows); });
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
