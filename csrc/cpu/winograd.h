// F(2×2, 3×3) of Lavin and Gray (2016): a convolution k3 s1 of channels_last images from tiles of 4×4 pixels that overlap by
// two, each of which gives 2×2 positions. Between the tiles here, 16 matrices (tiles, C), and those of the result stand 16
// matrix products, which are the vendor's: 16 multiplications for four positions, where 36 were.
//   image to tiles       Bᵀ d B      d: 4×4 pixels, zero outside the image
//   tiles to positions   Aᵀ m A
// with Bᵀ = (1 0 -1 0 | 0 1 1 0 | 0 -1 1 0 | 0 1 0 -1) and Aᵀ = (1 1 1 0 | 0 1 -1 -1).

// One dimension of each, of the vectors at p, p + step, ….
FASTGAN_INLINE void transform_pixels(f32v* p, int step) {
  const f32v a = p[0], b = p[step], c = p[2 * step], d = p[3 * step];
  p[0] = a - c;
  p[step] = b + c;
  p[2 * step] = c - b;
  p[3 * step] = b - d;
}
FASTGAN_INLINE void transform_products(f32v* p, int step) {
  const f32v a = p[0], b = p[step], c = p[2 * step], d = p[3 * step];
  p[0] = a + b + c;
  p[step] = b - c - d;
}

// f(found, tile, n, first row, first column, c, count) for every vector of channels of every tile. Whether what was added
// to `found` is zero.
template <class F> bool for_tiles(const Winograd& a, F f) {
  constexpr int W = lanes<float>;
  const int64_t rows = ceil_div(a.OH, 2), columns = ceil_div(a.OW, 2);
  bool finite = true;
#pragma omp parallel reduction(&& : finite) if (a.N * rows * columns * 16 * a.C > parallel_threshold)
  {
    f32v found = {};
#pragma omp for collapse(2) schedule(static)
    for (int64_t n = 0; n < a.N; ++n)
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t column = 0; column < columns; ++column) {
          const int64_t tile = (n * rows + row) * columns + column;
          int64_t c = 0;
          for (; c + W <= a.C; c += W) f(found, tile, n, 2 * row, 2 * column, c, W);
          if (c < a.C) f(found, tile, n, 2 * row, 2 * column, c, static_cast<int>(a.C - c));
        }
    for (int i = 0; i < W; ++i) finite = finite && found[i] == 0;
  }
  return finite;
}

void winograd_image_to_tiles(const Winograd& a, const float* image, float* tiles) {
  for_tiles(a, [&](f32v&, int64_t tile, int64_t n, int64_t row, int64_t column, int64_t c, int count) __attribute__((always_inline)) {
    const int64_t top = row - a.pad_h, left = column - a.pad_w;
    const float* const from = image + ((n * a.H + top) * a.W + left) * a.C + c;
    f32v d[16];
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) {
        const bool inside = top + i >= 0 && top + i < a.H && left + j >= 0 && left + j < a.W;
        d[4 * i + j] = inside ? load(from + (i * a.W + j) * a.C, count) : f32v{};
      }
    for (int j = 0; j < 4; ++j) transform_pixels(d + j, 4);
    for (int i = 0; i < 4; ++i) transform_pixels(d + 4 * i, 1);
    for (int k = 0; k < 16; ++k) store(tiles + k * a.step + tile * a.C + c, d[k], count);
  });
}

bool winograd_tiles_to_positions(const Winograd& a, const float* tiles, const float* bias, float* positions) {
  return for_tiles(a, [&](f32v& found, int64_t tile, int64_t n, int64_t row, int64_t column, int64_t c, int count) __attribute__((always_inline)) {
    f32v m[16];
    for (int k = 0; k < 16; ++k) m[k] = load(tiles + k * a.step + tile * a.C + c, count);
    for (int j = 0; j < 4; ++j) transform_products(m + j, 4);
    for (int i = 0; i < 2; ++i) transform_products(m + 4 * i, 1);
    const f32v shift = bias ? load(bias + c, count) : f32v{};
    float* const to = positions + ((n * a.OH + row) * a.OW + column) * a.C + c;
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j)
        if (row + i < a.OH && column + j < a.OW) {
          store(to + (i * a.OW + j) * a.C, m[4 * i + j] + shift, count);
          found += m[4 * i + j] - m[4 * i + j]; // 0, or nan
        }
  });
}
