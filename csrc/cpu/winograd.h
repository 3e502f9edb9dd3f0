// Convolutions of channels_last images by the minimal filtering algorithms of Winograd (Lavin and Gray, 2016), F(2×2, ·): a
// tile of pixels gives 2×2 positions, with fewer multiplications between its transform and theirs. Those are products of
// matrices, in which a row is a tile and a column a channel. A thread transforms some tiles into left factors, multiplies, and
// transforms back, while all of it is in its cache.
//
//     k3 s1   16 matrices: a tile is 4×4 pixels, and 16 multiplications stand for 36
//     k4 s2   9 matrices of four phases beside each other, the even and odd rows and columns, each a convolution k2 s1 of every
//             other pixel: a tile is 3×3 pixels of each, and 9 multiplications stand for 16

// ── Transforms ───────────────────────────────────────────────────────────────────────────────────────────────────────

FASTGAN_INLINE int64_t whole_vectors(int64_t channels) { return ceil_div(channels, lanes<float>) * lanes<float>; }

struct Tile {
  int64_t n, row, column; // of its first position
};
struct TilesOf {
  int64_t rows, columns, count;
  explicit TilesOf(const Winograd& a) : rows(ceil_div(a.OH, 2)), columns(ceil_div(a.OW, 2)), count(a.N * rows * columns) {}
  Tile operator[](int64_t tile) const { return {tile / (rows * columns), tile / columns % rows * 2, tile % columns * 2}; }
};

// Where the pixels of a square lie in a channels_last image; zeros for those outside.
template <int size> struct Square {
  const float* at[size][size];
  Square(const float* image, int64_t H, int64_t W, int64_t C, const float* zeros, int64_t n, int64_t top, int64_t left) {
    for (int i = 0; i < size; ++i) {
      const int64_t y = top + i;
      for (int j = 0; j < size; ++j) {
        const int64_t x = left + j;
        at[i][j] = y >= 0 && y < H && x >= 0 && x < W ? image + ((n * H + y) * W + x) * C : zeros;
      }
    }
  }
};
// f(c, load) for every vector of so many channels: load(p) has what there is of the vector at p + c.
template <class F> FASTGAN_INLINE void for_vectors(int64_t channels, F f) {
  constexpr int W = lanes<float>;
  int64_t c = 0;
  for (; c + W <= channels; c += W) f(c, [c](const float* p) __attribute__((always_inline)) { return load(p + c); });
  const int rest = static_cast<int>(channels - c);
  if (rest > 0) f(c, [c, rest](const float* p) __attribute__((always_inline)) { return load_part(p + c, rest); });
}
// Adds to `found` what is 0, or nan where the number is not finite.
FASTGAN_INLINE void store_position(const Winograd& a, float* positions, const Tile& tile, int i, int j, int64_t o, f32v value,
                                   f32v shift, f32v& found) {
  if (tile.row + i >= a.OH || tile.column + j >= a.OW) return;
  store(positions + ((tile.n * a.OH + tile.row + i) * a.OW + tile.column + j) * a.O + o, value + shift,
        static_cast<int>(smaller(lanes<float>, a.O - o)));
  found += value - value;
}
FASTGAN_INLINE bool is_zero(const f32v& found) {
  bool zero = true;
  for (int i = 0; i < lanes<float>; ++i) zero = zero && found[i] == 0;
  return zero;
}

// The taps of so many channels from (o, c) on, along the one or the other axis, where there are some: taps[t][lane].
template <int taps> struct TapVectors {
  f32v at[taps];
  TapVectors(const Winograd& a, const float* weight, int64_t o, int64_t c, bool along_o) {
    constexpr int W = lanes<float>;
    float lane_of[taps][W] = {};
    const int64_t count = o < a.O && c < a.C ? smaller(W, along_o ? a.O - o : a.C - c) : 0;
    for (int64_t i = 0; i < count; ++i) {
      const float* const from = weight + (along_o ? o + i : o) * a.weight_o + (along_o ? c : c + i) * a.weight_c;
      for (int t = 0; t < taps; ++t) lane_of[t][i] = from[(a.flip ? taps - 1 - t : t) * a.weight_tap];
    }
    for (int t = 0; t < taps; ++t) at[t] = read<f32v>(lane_of[t]);
  }
};

// F(2×2, 3×3):
//   pixels to products      Bᵀ d B       Bᵀ = (1 0 -1 0 | 0 1 1 0 | 0 -1 1 0 | 0 1 0 -1)
//   taps to products        G g Gᵀ       Gᵀ = (1 ½ ½ 0 | 0 ½ -½ 0 | 0 ½ ½ 1)
//   products to positions   Aᵀ m A       Aᵀ = (1 1 1 0 | 0 1 -1 -1)
// and for the weight's gradient the transposes of the last two.
struct K3S1 {
  static constexpr int side = 4, matrices = side * side, phases = 1, taps = 9;
  static int64_t columns(const Winograd& a) { return whole_vectors(a.C); }

  FASTGAN_INLINE void transform_pixels(f32v* p, int step) {
    const f32v a = p[0], b = p[step], c = p[2 * step], d = p[3 * step];
    p[0] = a - c;
    p[step] = b + c;
    p[2 * step] = c - b;
    p[3 * step] = b - d;
  }
  static void read_tile(const Winograd& a, const float* image, const float* zeros, const Tile& tile, const Left& left, int64_t row,
                        float* to) {
    const Square<4> pixels(image, a.H, a.W, a.C, zeros, tile.n, tile.row - a.pad_h, tile.column - a.pad_w);
    for_vectors(a.C, [&](int64_t c, auto load) __attribute__((always_inline)) {
      f32v d[16];
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) d[4 * i + j] = load(pixels.at[i][j]);
      for (int j = 0; j < 4; ++j) transform_pixels(d + j, 4);
      for (int i = 0; i < 4; ++i) transform_pixels(d + 4 * i, 1);
      float* const from = to + left.at(row, c);
      for (int k = 0; k < 16; ++k) store(from + k * left.size, d[k]);
    });
  }

  FASTGAN_INLINE void transform_taps(const f32v& a, const f32v& b, const f32v& c, f32v* to, int step) {
    const f32v ends = 0.5f * (a + c), middle = 0.5f * b;
    to[0] = a;
    to[step] = ends + middle;
    to[2 * step] = ends - middle;
    to[3 * step] = c;
  }
  // Of a vector of position channels.
  static void read_weight(const Winograd& a, const float* weight, const Right& right, int64_t o, float* to) {
    for (int64_t c = 0; c < right.K; ++c) {
      const TapVectors<9> taps(a, weight, o, c, true);
      f32v rows[12], g[16];
      for (int j = 0; j < 3; ++j) transform_taps(taps.at[j], taps.at[3 + j], taps.at[6 + j], rows + j, 3);
      for (int i = 0; i < 4; ++i) transform_taps(rows[3 * i], rows[3 * i + 1], rows[3 * i + 2], g + 4 * i, 1);
      for (int k = 0; k < 16; ++k) store(to + k * right.size + right.at(c, o), g[k]);
    }
  }

  FASTGAN_INLINE void transform_products(f32v* p, int step) {
    const f32v a = p[0], b = p[step], c = p[2 * step], d = p[3 * step];
    p[0] = a + b + c;
    p[step] = b - c - d;
  }
  static void write_tile(const Winograd& a, const float* products, int64_t size, const float* bias, const Tile& tile,
                         float* positions, f32v& found) {
    for (int64_t o = 0; o < a.O; o += lanes<float>) {
      f32v m[16];
      for (int k = 0; k < 16; ++k) m[k] = load(products + k * size + o);
      for (int j = 0; j < 4; ++j) transform_products(m + j, 4);
      for (int i = 0; i < 2; ++i) transform_products(m + 4 * i, 1);
      const f32v shift = bias ? load(bias + o, static_cast<int>(smaller(lanes<float>, a.O - o))) : f32v{};
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j) store_position(a, positions, tile, i, j, o, m[4 * i + j], shift, found);
    }
  }

  // Of a weight's gradient, one row of the matrices, of some channels: right factors for each of the row's matrices, of which
  // this is row i; and likewise the left ones.
  static void read_row_of_tile(const Winograd& a, const float* image, const float* zeros, const Tile& tile, int row, int64_t first,
                               int64_t channels, const Right& right, int64_t i, float* to) {
    const Square<4> pixels(image, a.H, a.W, a.C, zeros, tile.n, tile.row - a.pad_h, tile.column - a.pad_w);
    for_vectors(channels, [&](int64_t c, auto load) __attribute__((always_inline)) {
      f32v d[4];
      for (int j = 0; j < 4; ++j) {
        const f32v one = load(pixels.at[row == 0 ? 0 : row == 2 ? 2 : 1][j] + first);
        const f32v other = load(pixels.at[row == 3 ? 3 : row == 2 ? 1 : 2][j] + first);
        d[j] = row == 1 ? one + other : one - other;
      }
      transform_pixels(d, 1);
      for (int k = 0; k < 4; ++k) store(to + k * right.size + right.at(i, c), d[k]);
    });
  }
  static void read_row_of_positions(const Winograd& a, const float* positions, const float* zeros, const Tile& tile, int row,
                                    int64_t first, int64_t channels, const LeftOfSums& left, int64_t i, float* to) {
    const Square<2> square(positions, a.OH, a.OW, a.O, zeros, tile.n, tile.row, tile.column);
    for_vectors(channels, [&](int64_t o, auto load) __attribute__((always_inline)) {
      f32v m[2];
      for (int j = 0; j < 2; ++j) {
        const f32v upper = row == 3 ? f32v{} : load(square.at[0][j] + first);
        const f32v lower = row == 0 ? f32v{} : load(square.at[1][j] + first);
        m[j] = row == 1 ? upper + lower : upper - lower;
      }
      float* const from = to + left.at(i, o);
      store(from, m[0]);
      store(from + left.size, m[0] + m[1]);
      store(from + 2 * left.size, m[0] - m[1]);
      store(from + 3 * left.size, -m[1]);
    });
  }
  FASTGAN_INLINE void transform_sums(const f32v& a, const f32v& b, const f32v& c, const f32v& d, f32v* to, int step) {
    const f32v middle = 0.5f * (b + c);
    to[0] = a + middle;
    to[step] = 0.5f * (b - c);
    to[2 * step] = middle + d;
  }
  // The taps' gradients; at(k, phase) has the sums of matrix k.
  template <class At> FASTGAN_INLINE void transform_sums(At at, f32v* found) {
    f32v rows[12];
    for (int j = 0; j < 4; ++j) transform_sums(at(j, 0), at(4 + j, 0), at(8 + j, 0), at(12 + j, 0), rows + j, 4);
    for (int i = 0; i < 3; ++i) transform_sums(rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3], found + 3 * i, 1);
  }
};

// F(2×2, 2×2) of each phase:
//   pixels to products      Bᵀ d B       Bᵀ = (1 -1 0 | 0 1 0 | 0 1 -1)
//   taps to products        G g Gᵀ       Gᵀ = (1 1 0 | 0 1 1)
//   products to positions   Aᵀ m A       Aᵀ = (1 1 0 | 0 1 -1)
// and for the gradients the transposes of all three. The numbers are only added and subtracted.
struct K4S2 {
  static constexpr int side = 3, matrices = side * side, phases = 4, taps = 16;
  static int64_t columns(const Winograd& a) { return 4 * whole_vectors(a.C); }

  FASTGAN_INLINE void transform_pixels(f32v* p, int step) {
    p[0] -= p[step];
    p[2 * step] = p[step] - p[2 * step];
  }
  static void read_tile(const Winograd& a, const float* image, const float* zeros, const Tile& tile, const Left& left, int64_t row,
                        float* to) {
    const int64_t width = left.K / 4;
    const Square<6> pixels(image, a.H, a.W, a.C, zeros, tile.n, 2 * tile.row - a.pad_h, 2 * tile.column - a.pad_w);
    for_vectors(a.C, [&](int64_t c, auto load) __attribute__((always_inline)) {
      for (int phase = 0; phase < 4; ++phase) {
        f32v d[9];
        for (int i = 0; i < 3; ++i)
          for (int j = 0; j < 3; ++j) d[3 * i + j] = load(pixels.at[2 * i + phase / 2][2 * j + phase % 2]);
        for (int j = 0; j < 3; ++j) transform_pixels(d + j, 3);
        for (int i = 0; i < 3; ++i) transform_pixels(d + 3 * i, 1);
        float* const from = to + left.at(row, phase * width + c);
        for (int k = 0; k < 9; ++k) store(from + k * left.size, d[k]);
      }
    });
  }
  // One row of the 3×3 matrices, of some channels: right factors, for each of the row's matrices and each phase `size` apart, of
  // which this is row i.
  static void read_row_of_tile(const Winograd& a, const float* image, const float* zeros, const Tile& tile, int row, int64_t first,
                               int64_t channels, const Right& right, int64_t i, float* to) {
    const Square<6> pixels(image, a.H, a.W, a.C, zeros, tile.n, 2 * tile.row - a.pad_h, 2 * tile.column - a.pad_w);
    for_vectors(channels, [&](int64_t c, auto load) __attribute__((always_inline)) {
      for (int phase = 0; phase < 4; ++phase) {
        const auto pixel = [&](int i, int j) __attribute__((always_inline)) {
          return load(pixels.at[2 * i + phase / 2][2 * j + phase % 2] + first);
        };
        f32v d[3];
        for (int j = 0; j < 3; ++j) {
          d[j] = pixel(1, j);
          if (row != 1) d[j] = row == 0 ? pixel(0, j) - d[j] : d[j] - pixel(2, j);
        }
        transform_pixels(d, 1);
        for (int k = 0; k < 3; ++k) store(to + (4 * k + phase) * right.size + right.at(i, c), d[k]);
      }
    });
  }

  // f(k, phase, product of taps in matrix k)
  template <class F> FASTGAN_INLINE void transform_taps(const TapVectors<16>& taps, F f) {
    for (int phase = 0; phase < 4; ++phase) {
      f32v g[2][3];
      for (int i = 0; i < 2; ++i) {
        const int tap = 4 * (2 * i + phase / 2) + phase % 2;
        g[i][0] = taps.at[tap];
        g[i][2] = taps.at[tap + 2];
        g[i][1] = g[i][0] + g[i][2];
      }
      for (int k = 0; k < 3; ++k) {
        f(k, phase, g[0][k]);
        f(3 + k, phase, g[0][k] + g[1][k]);
        f(6 + k, phase, g[1][k]);
      }
    }
  }
  // Of a vector of position channels.
  static void read_weight(const Winograd& a, const float* weight, const Right& right, int64_t o, float* to) {
    const int64_t width = right.K / 4;
    for (int64_t c = 0; c < width; ++c)
      transform_taps(TapVectors<16>(a, weight, o, c, true), [&](int k, int phase, f32v g) __attribute__((always_inline)) {
        store(to + k * right.size + right.at(phase * width + c, o), g);
      });
  }
  // Of the other direction, and one position channel.
  static void read_weight_to_image(const Winograd& a, const float* weight, const Right& right, int64_t o, float* to) {
    const int64_t width = whole_vectors(a.C);
    for (int64_t c = 0; c < width; c += lanes<float>)
      transform_taps(TapVectors<16>(a, weight, o, c, false), [&](int k, int phase, f32v g) __attribute__((always_inline)) {
        store(to + k * right.size + right.at(o, phase * width + c), g);
      });
    for (int64_t n = 4 * width; n < right.panels * block_columns; n += lanes<float>)
      for (int k = 0; k < 9; ++k) store(to + k * right.size + right.at(o, n), f32v{});
  }

  static void write_tile(const Winograd& a, const float* products, int64_t size, const float* bias, const Tile& tile,
                         float* positions, f32v& found) {
    for (int64_t o = 0; o < a.O; o += lanes<float>) {
      f32v m[2][3];
      for (int k = 0; k < 3; ++k) {
        const f32v middle = load(products + (3 + k) * size + o);
        m[0][k] = load(products + k * size + o) + middle;
        m[1][k] = middle - load(products + (6 + k) * size + o);
      }
      const f32v shift = bias ? load(bias + o, static_cast<int>(smaller(lanes<float>, a.O - o))) : f32v{};
      for (int i = 0; i < 2; ++i) {
        store_position(a, positions, tile, i, 0, o, m[i][0] + m[i][1], shift, found);
        store_position(a, positions, tile, i, 1, o, m[i][1] - m[i][2], shift, found);
      }
    }
  }

  // A tile's 2×2 positions in the left factors of the other direction.
  static void read_positions(const Winograd& a, const float* positions, const float* zeros, const Tile& tile, const Left& left,
                             int64_t row, float* to) {
    const Square<2> square(positions, a.OH, a.OW, a.O, zeros, tile.n, tile.row, tile.column);
    for_vectors(a.O, [&](int64_t o, auto load) __attribute__((always_inline)) {
      f32v m[2][3];
      for (int i = 0; i < 2; ++i) {
        m[i][0] = load(square.at[i][0]);
        m[i][2] = load(square.at[i][1]);
        m[i][1] = m[i][0] + m[i][2];
        m[i][2] = -m[i][2];
      }
      float* const from = to + left.at(row, o);
      for (int k = 0; k < 3; ++k) {
        store(from + k * left.size, m[0][k]);
        store(from + (3 + k) * left.size, m[0][k] + m[1][k]);
        store(from + (6 + k) * left.size, -m[1][k]);
      }
    });
  }
  // Of a weight's gradient, one row of the 3×3 matrices, of some channels.
  static void read_row_of_positions(const Winograd& a, const float* positions, const float* zeros, const Tile& tile, int row,
                                    int64_t first, int64_t channels, const LeftOfSums& left, int64_t i, float* to) {
    const Square<2> square(positions, a.OH, a.OW, a.O, zeros, tile.n, tile.row, tile.column);
    for_vectors(channels, [&](int64_t o, auto load) __attribute__((always_inline)) {
      f32v m[2];
      for (int j = 0; j < 2; ++j) {
        const f32v other = row == 0 ? f32v{} : load(square.at[1][j] + first);
        m[j] = row == 2 ? -other : load(square.at[0][j] + first) + other;
      }
      float* const from = to + left.at(i, o);
      store(from, m[0]);
      store(from + left.size, m[0] + m[1]);
      store(from + 2 * left.size, -m[1]);
    });
  }

  // Of the transpose: what goes to the first two pixels. The third has -c, for the next tile.
  FASTGAN_INLINE void own_pixels(const f32v& a, const f32v& b, const f32v& c, f32v& first, f32v& second) {
    first = a;
    second = b + c - a;
  }
  // The 4×4 pixels that a tile begins with, and what the tiles above and to the left have for them; beyond the last tiles there
  // may be pixels of those alone. `tile` is where the products of the tile lie, or would; `row` is how far those of the row
  // above are away.
  static void write_pixels(const Winograd& a, const TilesOf& tiles, int64_t n, int64_t row, int64_t column, const float* products,
                           int64_t size, int64_t stride, float* image, f32v& found) {
    const int64_t top = 4 * row - a.pad_h, left = 4 * column - a.pad_w, width = whole_vectors(a.C);
    const bool above = row > 0, beside = column > 0, within = row < tiles.rows, wide = column < tiles.columns;
    for (int64_t c = 0; c < a.C; c += lanes<float>) {
      const int count = static_cast<int>(smaller(lanes<float>, a.C - c));
      for (int phase = 0; phase < 4; ++phase) {
        const auto at = [&](int64_t away, int k) __attribute__((always_inline)) {
          return load(products + k * size - away * stride + phase * width + c);
        };
        f32v d[2][2] = {};
        f32v first, second;
        if (within && wide) {
          f32v v[2][3];
          for (int k = 0; k < 3; ++k) own_pixels(at(0, k), at(0, 3 + k), at(0, 6 + k), v[0][k], v[1][k]);
          for (int i = 0; i < 2; ++i) own_pixels(v[i][0], v[i][1], v[i][2], d[i][0], d[i][1]);
        }
        if (above && wide) {
          own_pixels(at(tiles.columns, 6), at(tiles.columns, 7), at(tiles.columns, 8), first, second);
          d[0][0] -= first;
          d[0][1] -= second;
        }
        if (beside && within) {
          own_pixels(at(1, 2), at(1, 5), at(1, 8), first, second);
          d[0][0] -= first;
          d[1][0] -= second;
        }
        if (above && beside) d[0][0] += at(tiles.columns + 1, 8);
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

  // The taps' gradients; at(k, phase) has the sums of matrix k.
  template <class At> FASTGAN_INLINE void transform_sums(At at, f32v* found) {
    for (int phase = 0; phase < 4; ++phase) {
      f32v g[2][3];
      for (int k = 0; k < 3; ++k) {
        const f32v middle = at(3 + k, phase);
        g[0][k] = at(k, phase) + middle;
        g[1][k] = at(6 + k, phase) + middle;
      }
      for (int i = 0; i < 2; ++i) {
        f32v* const to = found + 4 * (2 * i + phase / 2) + phase % 2;
        to[0] = g[i][0] + g[i][1];
        to[2] = g[i][1] + g[i][2];
      }
    }
  }
};

// ── Convolutions ─────────────────────────────────────────────────────────────────────────────────────────────────────

// Tiles of a thread at a time: so few that their factors and products stay in its L2, unless the weights, which are read again
// with every piece, do not stay in the L3, or there are few pieces.
FASTGAN_INLINE int64_t most_tiles(int64_t tiles, int64_t weights) {
  return weights <= int64_t{1} << 21 && tiles > 96 * omp_get_max_threads() ? 24 : 192;
}
// So many units at a time that the threads have equal shares. The bits do not depend on it.
FASTGAN_INLINE int64_t share_of(int64_t count, int64_t most) {
  const int64_t threads = omp_get_max_threads(), rounds = ceil_div(count, threads * most);
  return ceil_div(count, threads * rounds);
}
// The rows of the last block that belong to no tile: zeros, for what memory held may be slow to multiply.
FASTGAN_INLINE void clear_rows(const Left& left, int matrices, float* to) {
  for (int k = 0; k < matrices; ++k)
    for (int64_t r = left.rows; r < left.whole; ++r)
      for (int64_t c = 0; c < left.K; c += lanes<float>) store(to + k * left.size + left.at(r, c), f32v{});
}

template <class Form> bool winograd_image_to_positions_of(const Winograd& a, const float* image, const float* weight,
                                                          const float* bias, float* positions) {
  const TilesOf tiles(a);
  const Right right(Form::columns(a), a.O);
  const int64_t together = share_of(tiles.count, most_tiles(tiles.count, Form::matrices * right.size)), pieces = ceil_div(tiles.count, together);
  const Left left(together, right.K);
  const int64_t stride = right.panels * block_columns + lanes<float>, size = left.whole * stride;
  const int64_t of_factors = Form::matrices * left.size, of_products = Form::matrices * size;
  Workspace workspace(Form::matrices * right.size + omp_get_max_threads() * (of_factors + of_products) + a.C);
  const float* const zeros = workspace.zeros(a.C);
  float* const weights = workspace.take(Form::matrices * right.size);
  float* const of_threads = workspace.take(omp_get_max_threads() * (of_factors + of_products));
  bool finite = true;
#pragma omp parallel reduction(&& : finite)
  {
#pragma omp for schedule(static)
    for (int64_t o = 0; o < right.panels * block_columns; o += lanes<float>) Form::read_weight(a, weight, right, o, weights);
    float* const factors = of_threads + omp_get_thread_num() * (of_factors + of_products);
    float* const products = factors + of_factors;
    f32v found = {};
#pragma omp for schedule(dynamic)
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t first = piece * together, count = smaller(together, tiles.count - first);
      const Left some(count, left.K);
      for (int64_t i = 0; i < count; ++i) Form::read_tile(a, image, zeros, tiles[first + i], some, i, factors);
      clear_rows(some, Form::matrices, factors);
      for (int k = 0; k < Form::matrices; ++k)
        multiply(some, right, &factors[k * some.size], &weights[k * right.size], &products[k * size], stride);
      for (int64_t i = 0; i < count; ++i)
        Form::write_tile(a, &products[i * stride], size, bias, tiles[first + i], positions, found);
    }
    finite = finite && is_zero(found);
  }
  return finite;
}

bool winograd_image_to_positions(const Winograd& a, const float* image, const float* weight, const float* bias, float* positions) {
  return a.kernel == 3 ? winograd_image_to_positions_of<K3S1>(a, image, weight, bias, positions)
                       : winograd_image_to_positions_of<K4S2>(a, image, weight, bias, positions);
}

// Of k4 s2. Rows of 4×4 pixels, one more than an image has rows of tiles, are made of these and of the tiles above. Where a
// thread begins within an image, it computes those above once more.
bool winograd_positions_to_image(const Winograd& a, const float* positions, const float* weight, float* image) {
  constexpr int matrices = K4S2::matrices;
  const TilesOf tiles(a);
  const Right right(whole_vectors(a.O), K4S2::columns(a));
  const int64_t rows = tiles.rows + 1, most = larger(9, 3 * most_tiles(tiles.count, matrices * right.size) / tiles.columns);
  int64_t together = share_of(a.N * rows, most);
  if (together > rows) together = together / rows * rows; // whole images
  const int64_t pieces = ceil_div(a.N * rows, together);
  const Left left((together + 1) * tiles.columns, right.K);
  const int64_t stride = right.panels * block_columns + lanes<float>, size = left.whole * stride;
  const int64_t of_factors = matrices * left.size, of_products = matrices * size;
  Workspace workspace(matrices * right.size + omp_get_max_threads() * (of_factors + of_products) + a.O);
  const float* const zeros = workspace.zeros(a.O);
  float* const weights = workspace.take(matrices * right.size);
  float* const of_threads = workspace.take(omp_get_max_threads() * (of_factors + of_products));
  bool finite = true;
#pragma omp parallel reduction(&& : finite)
  {
#pragma omp for schedule(static)
    for (int64_t o = 0; o < left.K; ++o) K4S2::read_weight_to_image(a, weight, right, o, weights);
    float* const factors = of_threads + omp_get_thread_num() * (of_factors + of_products);
    float* const products = factors + of_factors;
    f32v found = {};
#pragma omp for schedule(dynamic)
    for (int64_t piece = 0; piece < pieces; ++piece) {
      // Of rows of tiles, `above` is the first that is read, and `below` the first that is not.
      const auto tile_row = [&](int64_t row) { return row / rows * tiles.rows + row % rows; };
      const int64_t first = piece * together, last = smaller(first + together, a.N * rows);
      const int64_t above = tile_row(first) - (first % rows > 0);
      const int64_t below = tile_row(last - 1) + ((last - 1) % rows < tiles.rows);
      const int64_t count = (below - above) * tiles.columns;
      const Left some(count, left.K);
      for (int64_t i = 0; i < count; ++i)
        K4S2::read_positions(a, positions, zeros, tiles[above * tiles.columns + i], some, i, factors);
      clear_rows(some, matrices, factors);
      for (int k = 0; k < matrices; ++k)
        multiply(some, right, &factors[k * some.size], &weights[k * right.size], &products[k * size], stride);
      for (int64_t row = first; row < last; ++row)
        for (int64_t column = 0; column <= tiles.columns; ++column)
          K4S2::write_pixels(a, tiles, row / rows, row % rows, column,
                             products + ((tile_row(row) - above) * tiles.columns + column) * stride, size, stride, image,
                             found);
    }
    finite = finite && is_zero(found);
  }
  return finite;
}

// positionsᵀ · pixels, each (tiles, channels), added up over the tiles. A thread has one row of the matrices and some channels of
// either at a time, so that its factors and sums stay in its L2; and with these so many tiles that pixels and positions stay in
// the L3 until all threads have read them.
template <class Form>
bool winograd_weight_grad_of(const Winograd& a, const float* positions, const float* image, float* grad_weight) {
  constexpr int W = lanes<float>, factors = Form::side * Form::phases;
  constexpr int64_t inputs = (Form::phases == 1 ? 2 : 1) * block_columns, most_blocks = 12, piece = depth, tiles_together = 4 * piece;
  const TilesOf tiles(a);
  const int64_t panels = ceil_div(a.C, inputs), blocks = ceil_div(a.O, block_rows);
  const int64_t shares = ceil_div(2 * omp_get_max_threads(), Form::side * panels);
  const int64_t groups = smaller(blocks, larger(ceil_div(blocks, most_blocks), shares)), outputs = ceil_div(blocks, groups) * block_rows;
  const int64_t block = outputs * inputs; // of sums, for each of the factors
  const LeftOfSums left(piece, outputs);
  const Right right(piece, inputs);
  const int64_t of_sums = Form::side * panels * groups * factors * block, of_lefts = Form::side * left.size, of_rights = factors * right.size;
  Workspace workspace(of_sums + omp_get_max_threads() * (of_lefts + of_rights) + larger(a.C, a.O));
  const float* const zeros = workspace.zeros(larger(a.C, a.O));
  float* const sums = workspace.take(of_sums);
  float* const of_threads = workspace.take(omp_get_max_threads() * (of_lefts + of_rights));
  const auto sums_of = [&](int64_t row, int64_t panel, int64_t group) {
    return sums + ((row * panels + panel) * groups + group) * factors * block;
  };
  bool finite = true;
#pragma omp parallel reduction(&& : finite)
  {
    float* const lefts = of_threads + omp_get_thread_num() * (of_lefts + of_rights);
    float* const rights = lefts + of_lefts;
    for (int64_t begin = 0; begin < tiles.count; begin += tiles_together)
#pragma omp for collapse(3) schedule(dynamic)
      for (int row = 0; row < Form::side; ++row)
        for (int64_t panel = 0; panel < panels; ++panel)
          for (int64_t group = 0; group < groups; ++group)
            for (int64_t first = begin; first < smaller(begin + tiles_together, tiles.count); first += piece) {
              const int64_t c = panel * inputs, o = group * outputs, columns = smaller(inputs, a.C - c);
              const int64_t count = smaller(piece, tiles.count - first), rows = smaller(outputs, a.O - o);
              for (int64_t i = 0; i < count; ++i) {
                Form::read_row_of_positions(a, positions, zeros, tiles[first + i], row, o, rows, left, i, lefts);
                Form::read_row_of_tile(a, image, zeros, tiles[first + i], row, c, columns, right, i, rights);
              }
              for (int k = 0; k < factors; ++k)
                for (int64_t n = 0; n < columns; n += block_columns)
                  for (int64_t r = 0; r < rows; r += block_rows)
                    multiply_block<1>(rows - r, lefts + k / Form::phases * left.size + left.at(0, r), LeftOfSums::width,
                                      rights + k * right.size + right.at(0, n), count,
                                      sums_of(row, panel, group) + k * block + n * outputs + r * block_columns, block_columns,
                                      first > 0);
            }
    f32v found = {};
#pragma omp for schedule(static)
    for (int64_t o = 0; o < a.O; ++o)
      for (int64_t c = 0; c < a.C; c += W) {
        f32v taps[Form::taps];
        Form::transform_sums(
            [&](int k, int phase) __attribute__((always_inline)) {
              const float* const of_block = sums_of(k / Form::side, c / inputs, o / outputs) + (k % Form::side * Form::phases + phase) * block;
              return load(of_block + c % inputs / block_columns * block_columns * outputs + o % outputs * block_columns + c % block_columns);
            },
            taps);
        for (int t = 0; t < Form::taps; ++t) {
          for (int64_t i = 0; i < smaller(W, a.C - c); ++i) grad_weight[(o * a.C + c + i) * Form::taps + t] = taps[t][i];
          found += taps[t] - taps[t]; // 0, or nan
        }
      }
    finite = finite && is_zero(found);
  }
  return finite;
}

bool winograd_weight_grad(const Winograd& a, const float* positions, const float* image, float* grad_weight) {
  return a.kernel == 3 ? winograd_weight_grad_of<K3S1>(a, positions, image, grad_weight)
                       : winograd_weight_grad_of<K4S2>(a, positions, image, grad_weight);
}
