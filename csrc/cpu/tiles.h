// The CPU's matrix unit (AMX), which multiplies 16×32 by 32×16 tiles of bfloat16 and adds up in float32.
//
// float32 keeps its precision: a number is the sum of three bfloat16 (8 + 8 + 8 bits of its 24), and the six products of
// parts that reach into the 24 bits are summed. That is six products at sixteen times the speed of float32 lanes.

constexpr int tile_rows = 16, depth = 32;             // depth: bfloat16 of one row of a tile
constexpr int block_rows = 2 * tile_rows;             // rows, or columns, of one step: two tiles
constexpr int64_t tile_bytes = 1024;                  // 16 rows of 64 bytes, whatever the tile holds
constexpr int64_t sum_bytes = 4 * tile_bytes;         // the accumulators of one step

#define FASTGAN_MEMBER inline __attribute__((always_inline))
FASTGAN_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Tiles { // configures the calling thread's tiles while it lives
  struct __attribute__((packed)) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };
  Tiles() {
    Config config;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = tile_rows;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Tiles 0..3 are the accumulators (row block i, column block j at 2i + j), 4 and 5 hold a, 6 and 7 hold b.
FASTGAN_INLINE void load_a(const char* a) {
  _tile_loadd(4, a, 64);
  _tile_loadd(5, a + tile_bytes, 64);
}
template <int Columns> FASTGAN_INLINE void load_b(const char* b) {
  _tile_loadd(6, b, 64);
  if (Columns == 2) _tile_loadd(7, b + tile_bytes, 64);
}
template <int Columns> FASTGAN_INLINE void multiply() {
  _tile_dpbf16ps(0, 4, 6);
  if (Columns == 2) _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  if (Columns == 2) _tile_dpbf16ps(3, 5, 7);
}

// accumulators += a · b over 32 channels: a of 32 rows, b of 16 · Columns columns, in `Parts` bfloat16 each. The smallest
// products come first: added to a large sum, each would cost it a rounding.
template <int Parts, int Columns> FASTGAN_INLINE void step(const char* a, const char* b) {
  if (Parts == 3) {
    const char *a1 = a + 2 * tile_bytes, *a2 = a + 4 * tile_bytes, *b1 = b + 2 * tile_bytes, *b2 = b + 4 * tile_bytes;
    load_a(a2);
    load_b<Columns>(b);
    multiply<Columns>();
    load_a(a1);
    multiply<Columns>();
    load_b<Columns>(b1);
    multiply<Columns>();
    load_a(a);
    load_b<Columns>(b2);
    multiply<Columns>();
    load_b<Columns>(b1);
    multiply<Columns>();
  } else {
    load_a(a);
  }
  load_b<Columns>(b);
  multiply<Columns>();
}

FASTGAN_INLINE void zero_accumulators() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
template <int Columns> FASTGAN_INLINE void store_accumulators(float* to) {
  _tile_stored(0, to, 64);
  _tile_stored(2, to + 512, 64);
  if (Columns == 1) return;
  _tile_stored(1, to + 256, 64);
  _tile_stored(3, to + 768, 64);
}
// sum (2, 2, 16, 16) += the accumulators: many short sums added up lose fewer digits than a long one.
template <int Columns> FASTGAN_INLINE void add_accumulators(float* sum) {
  alignas(64) float part[1024];
  store_accumulators<Columns>(part);
  for (int tile = 0; tile < 4; tile += 3 - Columns)
    for (int i = tile * 256; i < (tile + 1) * 256; i += 16)
      _mm512_store_ps(sum + i, _mm512_load_ps(sum + i) + _mm512_load_ps(part + i));
}

// ── Parts of numbers ─────────────────────────────────────────────────────────────────────────────────────────────────

FASTGAN_INLINE __m512 widen(__m256i bfloat16s) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloat16s), 16));
}
FASTGAN_INLINE __m512 nearest(__m512 v) { return widen((__m256i)_mm512_cvtneps_pbh(v)); }

// The largest magnitude among the numbers that have been split, as the bits of a float32.
struct Largest {
  __m512i bits;
  Largest() { bits = _mm512_setzero_si512(); }
  inline __attribute__((always_inline)) void see(__m512 v) {
    bits = _mm512_max_epu32(bits, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
  }
  uint32_t of_all() const { return _mm512_reduce_max_epu32(bits); }
};

// Whether the parts stand for the numbers of two operands with these largest magnitudes. What is infinite, NaN or would be
// rounded to infinity has no parts. And the matrix unit takes subnormal numbers for zero, which is below float32's rounding
// unless all products are tiny.
FASTGAN_INLINE bool splits(uint32_t largest_a, uint32_t largest_b) {
  constexpr uint32_t rounds_to_infinity = 0x7f7f8000u;
  if (largest_a >= rounds_to_infinity || largest_b >= rounds_to_infinity) return false;
  if (largest_a == 0 || largest_b == 0) return true;
  const int a = static_cast<int>(largest_a >> 23) - 127, b = static_cast<int>(largest_b >> 23) - 127; // binary exponents
  return a >= -100 && b >= -100 && a + b >= -96;
}

FASTGAN_INLINE float scalar(float value) { return value; }
FASTGAN_INLINE float scalar(bfloat16 value) { return bits_as<float>(uint32_t(value.bits) << 16); }
FASTGAN_INLINE __m512 load16(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
FASTGAN_INLINE __m512 load16(const bfloat16* p, __mmask16 mask) { return widen(_mm256_maskz_loadu_epi16(mask, p)); }
FASTGAN_INLINE void store16(float* p, __m512 v, __mmask16 mask) { _mm512_mask_storeu_ps(p, mask, v); }
FASTGAN_INLINE void store16(bfloat16* p, __m512 v, __mmask16 mask) {
  _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(v));
}
FASTGAN_INLINE __mmask16 first16(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1);
}

// 32 numbers as a row of a tile, each part in a tile of its own, `stride` bytes apart.
template <int Parts> FASTGAN_INLINE void split_row(__m512 v0, __m512 v1, char* to, int64_t stride, Largest& largest) {
  if (Parts > 1) largest.see(v0), largest.see(v1);
  for (int part = 0; part < Parts; ++part, to += stride) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(v1, v0);
    _mm512_store_si512(to, both);
    v0 -= widen(_mm512_castsi512_si256(both));
    v1 -= widen(_mm512_extracti64x4_epi64(both, 1));
  }
}
// Two times 16 numbers as a row of the right operand: pairs, as the unit wants them.
template <int Parts>
FASTGAN_INLINE void split_pair(__m512 even, __m512 odd, char* to, int64_t stride, Largest& largest) {
  if (Parts > 1) largest.see(even), largest.see(odd);
  for (int part = 0; part < Parts; ++part, to += stride) {
    const __m512 even_part = nearest(even), odd_part = nearest(odd);
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even_part), 16);
    _mm512_store_si512(to, _mm512_or_si512(low, _mm512_castps_si512(odd_part)));
    even -= even_part;
    odd -= odd_part;
  }
}

// Transposes 16×16 floats in registers.
FASTGAN_INLINE void transpose16(__m512* r) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512 a = _mm512_unpacklo_ps(r[i], r[i + 1]), b = _mm512_unpackhi_ps(r[i], r[i + 1]);
    const __m512 c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm512_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(t[i], t[4 + i], 0x88), b = _mm512_shuffle_f32x4(t[i], t[4 + i], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(t[8 + i], t[12 + i], 0x88), d = _mm512_shuffle_f32x4(t[8 + i], t[12 + i], 0xdd);
    r[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    r[8 + i] = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[4 + i] = _mm512_shuffle_f32x4(b, d, 0x88);
    r[12 + i] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

// ── Packing ──────────────────────────────────────────────────────────────────────────────────────────────────────────

template <class T> constexpr int parts_of = sizeof(T) == sizeof(float) ? 3 : 1;

// One block of rows, channels in the depth of tiles: (channel block, part, 2 tiles, 16 rows, 32 channels).
template <class T> FASTGAN_INLINE void pack_rows(const T* const* rows, int64_t at, int64_t channels, char* to, Largest& largest) {
  constexpr int Parts = parts_of<T>;
  for (int64_t c = 0; c < channels; c += depth, to += Parts * 2 * tile_bytes) {
    const __mmask16 mask0 = first16(channels - c), mask1 = first16(channels - c - 16);
    for (int r = 0; r < block_rows; ++r) {
      __m512 v0 = _mm512_setzero_ps(), v1 = v0;
      if (rows[r]) v0 = load16(rows[r] + at + c, mask0), v1 = load16(rows[r] + at + c + 16, mask1);
      split_row<Parts>(v0, v1, to + r * 64, 2 * tile_bytes, largest);
    }
  }
}
// One block of rows, rows in the depth of the left operand: (channel block, part, 2 tiles, 16 channels, 32 rows).
template <class T> FASTGAN_INLINE void pack_transposed(const T* const* rows, int64_t at, int64_t channels, char* to, Largest& largest) {
  constexpr int Parts = parts_of<T>;
  for (int64_t block = 0; block < channels; block += block_rows, to += Parts * 2 * tile_bytes)
    for (int half = 0; half < 2; ++half) {
      const int64_t c = block + half * 16;
      const __mmask16 mask = first16(channels - c);
      __m512 v[2][16];
      for (int r = 0; r < block_rows; ++r)
        v[r / 16][r % 16] = rows[r] ? load16(rows[r] + at + c, mask) : _mm512_setzero_ps();
      transpose16(v[0]);
      transpose16(v[1]);
      for (int i = 0; i < 16; ++i)
        split_row<Parts>(v[0][i], v[1][i], to + half * tile_bytes + i * 64, 2 * tile_bytes, largest);
    }
}
// One block of rows, rows in the depth of the right operand: (channel block, part, 2 tiles, 16 pairs of rows, 16 channels, 2).
template <class T> FASTGAN_INLINE void pack_paired(const T* const* rows, int64_t at, int64_t channels, char* to, Largest& largest) {
  constexpr int Parts = parts_of<T>;
  for (int64_t block = 0; block < channels; block += block_rows, to += Parts * 2 * tile_bytes)
    for (int half = 0; half < 2; ++half) {
      const int64_t c = block + half * 16;
      const __mmask16 mask = first16(channels - c);
      for (int r = 0; r < block_rows; r += 2) {
        const __m512 even = rows[r] ? load16(rows[r] + at + c, mask) : _mm512_setzero_ps();
        const __m512 odd = rows[r + 1] ? load16(rows[r + 1] + at + c, mask) : _mm512_setzero_ps();
        split_pair<Parts>(even, odd, to + half * tile_bytes + r / 2 * 64, 2 * tile_bytes, largest);
      }
    }
}

// Memory for packed tiles, at the start of a cache line. A thread keeps what it has freed for its next call: fresh memory
// has to be mapped page by page, which takes longer than packing it.
struct Memory {
  char* data;
  int64_t bytes;
};
struct KeptMemory {
  static constexpr int64_t most_bytes = 32 << 20;
  Memory list[4] = {};
  ~KeptMemory() {
    for (Memory& kept : list) release(kept);
  }
  static void release(Memory& memory) { ::operator delete(memory.data, std::align_val_t(64)); }
};
inline thread_local KeptMemory kept_memory;

struct Packed : Memory {
  explicit Packed(int64_t needed) : Memory{nullptr, round_up(needed, 64)} {
    for (Memory& kept : kept_memory.list)
      if (kept.bytes >= bytes && kept.bytes <= 4 * bytes) {
        static_cast<Memory&>(*this) = kept;
        kept = {};
        return;
      }
    data = static_cast<char*>(::operator new(bytes, std::align_val_t(64)));
  }
  ~Packed() {
    Memory* smallest = kept_memory.list;
    for (Memory& kept : kept_memory.list)
      if (kept.bytes < smallest->bytes) smallest = &kept;
    if (bytes <= KeptMemory::most_bytes && bytes > smallest->bytes) {
      const Memory exchanged = *smallest;
      *smallest = *this;
      static_cast<Memory&>(*this) = exchanged;
    }
    KeptMemory::release(*this);
  }
  Packed(const Packed&) = delete;
  Packed& operator=(const Packed&) = delete;
};
