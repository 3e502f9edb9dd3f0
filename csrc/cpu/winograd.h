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

// F(2×2, 2×2) of a convolution k4 s2: its four phases, of even and odd rows and columns, are each a convolution k2 s1 of every
// other pixel. A tile is 6×6 pixels, which overlap by two, and gives 2×2 positions with 9 multiplications of each phase, where
// 16 were. Between 9 matrices (tiles, 4·C), the phases beside each other, and 9 of products (tiles, O) stand matrix products.
//   image to phases            Bᵀ d B of each phase, d: 3×3 of its pixels
//   products to positions      Aᵀ m A
// with Bᵀ = (1 -1 0 | 0 1 0 | 0 1 -1) and Aᵀ = (1 1 0 | 0 1 -1), and for the gradients the transposes of both.
FASTGAN_INLINE void transform_phase(f32v* p, int step) {
  p[0] -= p[step];
  p[2 * step] = p[step] - p[2 * step];
}
// Of the transpose: what goes to the first two pixels. The third has -c, for the next tile.
FASTGAN_INLINE void own_pixels(const f32v& a, const f32v& b, const f32v& c, f32v& first, f32v& second) {
  first = a;
  second = b + c - a;
}

void winograd_image_to_phases(const Winograd& a, const float* image, float* tiles) {
  for_tiles(a, [&](f32v&, int64_t tile, int64_t n, int64_t row, int64_t column, int64_t c, int count) __attribute__((always_inline)) {
    const int64_t top = 2 * row - a.pad_h, left = 2 * column - a.pad_w;
    const float* const from = image + ((n * a.H + top) * a.W + left) * a.C + c;
    for (int phase = 0; phase < 4; ++phase) {
      const int r = phase / 2, s = phase % 2;
      f32v d[9];
      for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) {
          const int y = 2 * i + r, x = 2 * j + s;
          const bool inside = top + y >= 0 && top + y < a.H && left + x >= 0 && left + x < a.W;
          d[3 * i + j] = inside ? load(from + (y * a.W + x) * a.C, count) : f32v{};
        }
      for (int j = 0; j < 3; ++j) transform_phase(d + j, 3);
      for (int i = 0; i < 3; ++i) transform_phase(d + 3 * i, 1);
      for (int k = 0; k < 9; ++k) store(tiles + k * a.step + (4 * tile + phase) * a.C + c, d[k], count);
    }
  });
}

// Each tile writes the 4×4 pixels that it begins with, and adds what the tiles above and to the left have for them; beyond
// the last ones there may be pixels of those alone.
bool winograd_phases_to_image(const Winograd& a, const float* tiles, float* image) {
  constexpr int W = lanes<float>;
  const int64_t rows = ceil_div(a.OH, 2), columns = ceil_div(a.OW, 2);
  bool finite = true;
#pragma omp parallel reduction(&& : finite) if (a.N * rows * columns * 36 * a.C > parallel_threshold)
  {
    f32v found = {};
#pragma omp for collapse(2) schedule(static)
    for (int64_t n = 0; n < a.N; ++n)
      for (int64_t row = 0; row <= rows; ++row)
        for (int64_t column = 0; column <= columns; ++column) {
          const int64_t top = 4 * row - a.pad_h, left = 4 * column - a.pad_w;
          const int64_t tile = (n * rows + row) * columns + column;
          const bool above = row > 0, beside = column > 0, within = row < rows, wide = column < columns;
          for (int64_t c = 0; c < a.C; c += W) {
            const int count = static_cast<int>(std::min<int64_t>(W, a.C - c));
            for (int phase = 0; phase < 4; ++phase) {
              const auto at = [&](int64_t t, int k) __attribute__((always_inline)) {
                return load(tiles + k * a.step + (4 * t + phase) * a.C + c, count);
              };
              f32v d[2][2] = {};
              f32v first, second;
              if (within && wide) {
                f32v v[2][3];
                for (int k = 0; k < 3; ++k) own_pixels(at(tile, k), at(tile, 3 + k), at(tile, 6 + k), v[0][k], v[1][k]);
                for (int i = 0; i < 2; ++i) own_pixels(v[i][0], v[i][1], v[i][2], d[i][0], d[i][1]);
              }
              if (above && wide) {
                const int64_t t = tile - columns;
                own_pixels(at(t, 6), at(t, 7), at(t, 8), first, second);
                d[0][0] -= first;
                d[0][1] -= second;
              }
              if (beside && within) {
                const int64_t t = tile - 1;
                own_pixels(at(t, 2), at(t, 5), at(t, 8), first, second);
                d[0][0] -= first;
                d[1][0] -= second;
              }
              if (above && beside) d[0][0] += at(tile - columns - 1, 8);
              for (int i = 0; i < 2; ++i)
                for (int j = 0; j < 2; ++j) {
                  const int64_t y = top + 2 * i + phase / 2, x = left + 2 * j + phase % 2;
                  if (y < 0 || y >= a.H || x < 0 || x >= a.W) continue;
                  store(image + ((n * a.H + y) * a.W + x) * a.C + c, d[i][j], count);
                  found += d[i][j] - d[i][j]; // 0, or nan
                }
            }
          }
        }
    for (int i = 0; i < W; ++i) finite = finite && found[i] == 0;
  }
  return finite;
}

void winograd_positions_to_products(const Winograd& a, const float* positions, float* products) {
  for_tiles(a, [&](f32v&, int64_t tile, int64_t n, int64_t row, int64_t column, int64_t c, int count) __attribute__((always_inline)) {
    const float* const from = positions + ((n * a.OH + row) * a.OW + column) * a.C + c;
    f32v m[2][3];
    for (int i = 0; i < 2; ++i) {
      f32v y[2];
      for (int j = 0; j < 2; ++j)
        y[j] = row + i < a.OH && column + j < a.OW ? load(from + (i * a.OW + j) * a.C, count) : f32v{};
      m[i][0] = y[0];
      m[i][1] = y[0] + y[1];
      m[i][2] = -y[1];
    }
    float* const to = products + tile * a.C + c;
    for (int k = 0; k < 3; ++k) {
      store(to + k * a.step, m[0][k], count);
      store(to + (3 + k) * a.step, m[0][k] + m[1][k], count);
      store(to + (6 + k) * a.step, -m[1][k], count);
    }
  });
}

bool winograd_products_to_positions(const Winograd& a, const float* products, const float* bias, float* positions) {
  return for_tiles(a, [&](f32v& found, int64_t tile, int64_t n, int64_t row, int64_t column, int64_t c, int count) __attribute__((always_inline)) {
    f32v m[2][3];
    for (int k = 0; k < 3; ++k) {
      const auto at = [&](int i) __attribute__((always_inline)) { return load(products + i * a.step + tile * a.C + c, count); };
      const f32v middle = at(3 + k);
      m[0][k] = at(k) + middle;
      m[1][k] = middle - at(6 + k);
    }
    const f32v shift = bias ? load(bias + c, count) : f32v{};
    float* const to = positions + ((n * a.OH + row) * a.OW + column) * a.C + c;
    for (int i = 0; i < 2; ++i) {
      const f32v y[2] = {m[i][0] + m[i][1], m[i][1] - m[i][2]};
      for (int j = 0; j < 2; ++j)
        if (row + i < a.OH && column + j < a.OW) {
          store(to + (i * a.OW + j) * a.C, y[j] + shift, count);
          found += y[j] - y[j]; // 0, or nan
        }
    }
  });
}

// The weight (O, C, 4, 4), or its gradient, and the 9 matrices (O, 4·C): G g Gᵀ of each phase's taps, Gᵀ = (1 1 0 | 0 1 1).
// f(taps, matrices, o, c, count): `taps` are the vectors of the 16 taps of some channels, or are to be.
template <bool reads, class Weight, class F> void for_weights(int64_t O, int64_t C, Weight* weight, F f) {
  constexpr int W = lanes<float>;
#pragma omp parallel for schedule(static) if (O * C * 16 > parallel_threshold)
  for (int64_t o = 0; o < O; ++o)
    for (int64_t c = 0; c < C; c += W) {
      const int count = static_cast<int>(std::min<int64_t>(W, C - c));
      Weight* const at = weight + (o * C + c) * 16;
      float taps[16][W] = {};
      if constexpr (reads)
        for (int i = 0; i < count; ++i)
          for (int t = 0; t < 16; ++t) taps[t][i] = at[16 * i + t];
      f(taps, o, c, count);
      if constexpr (!reads)
        for (int i = 0; i < count; ++i)
          for (int t = 0; t < 16; ++t) at[16 * i + t] = taps[t][i];
    }
}

void winograd_weight_to_phases(int64_t O, int64_t C, const float* weight, float* phases) {
  for_weights<true>(O, C, weight, [&](const float (*taps)[lanes<float>], int64_t o, int64_t c, int count) __attribute__((always_inline)) {
    for (int phase = 0; phase < 4; ++phase) {
      float* const to = phases + (4 * o + phase) * C + c;
      f32v g[2][3];
      for (int i = 0; i < 2; ++i) {
        const int tap = 4 * (2 * i + phase / 2) + phase % 2;
        g[i][0] = read<f32v>(taps[tap]);
        g[i][2] = read<f32v>(taps[tap + 2]);
        g[i][1] = g[i][0] + g[i][2];
      }
      for (int k = 0; k < 3; ++k) {
        store(to + k * O * 4 * C, g[0][k], count);
        store(to + (3 + k) * O * 4 * C, g[0][k] + g[1][k], count);
        store(to + (6 + k) * O * 4 * C, g[1][k], count);
      }
    }
  });
}

void winograd_phases_to_weight(int64_t O, int64_t C, const float* phases, float* weight) {
  for_weights<false>(O, C, weight, [&](float (*taps)[lanes<float>], int64_t o, int64_t c, int count) __attribute__((always_inline)) {
    for (int phase = 0; phase < 4; ++phase) {
      const float* const from = phases + (4 * o + phase) * C + c;
      f32v g[2][3];
      for (int k = 0; k < 3; ++k) {
        const f32v middle = load(from + (3 + k) * O * 4 * C, count);
        g[0][k] = load(from + k * O * 4 * C, count) + middle;
        g[1][k] = load(from + (6 + k) * O * 4 * C, count) + middle;
      }
      for (int i = 0; i < 2; ++i) {
        const int tap = 4 * (2 * i + phase / 2) + phase % 2;
        write(taps[tap], g[i][0] + g[i][1]);
        write(taps[tap + 2], g[i][1] + g[i][2]);
      }
    }
  });
}
