// Products of float32 matrices of which kernels write the factors as they are read: in pieces that stay in the L1, while a block of
// sums stays in registers.

// Memory that the next call finds again, for the system clears what it gives anew; in huge pages, where there are some, as the
// rows that are written together are far apart.
class Workspace {
  static constexpr size_t page = size_t{1} << 21, most_kept = size_t{1} << 26;
  struct Block {
    size_t bytes;
  };
  static Block*& kept() {
    static Block* block = nullptr;
    return block;
  }
  static Block* exchange(Block* block) { return __atomic_exchange_n(&kept(), block, __ATOMIC_ACQ_REL); }
  static void give_back(Block* block) {
    if (block) ::operator delete(block, std::align_val_t{page});
  }

  Block* block;
  float* next;

 public:
  explicit Workspace(int64_t count) : block(exchange(nullptr)) {
    const size_t bytes = (8 * lanes<float> + count) * sizeof(float); // each part of whole vectors
    if (!block || block->bytes < bytes) {
      give_back(block);
      const size_t whole = (bytes + page - 1) / page * page;
      block = static_cast<Block*>(::operator new(whole, std::align_val_t{page}));
#if defined(__linux__)
      madvise(block, whole, MADV_HUGEPAGE);
#endif
      block->bytes = whole;
    }
    next = reinterpret_cast<float*>(block) + lanes<float>;
  }
  ~Workspace() { give_back(block->bytes <= most_kept ? exchange(block) : block); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  float* take(int64_t count) {
    float* const part = next;
    next += ceil_div(count, lanes<float>) * lanes<float>;
    return part;
  }
  const float* zeros(int64_t count) {
    float* const part = take(count);
    __builtin_memset(part, 0, count * sizeof(float));
    return part;
  }
};

// ── Products ─────────────────────────────────────────────────────────────────────────────────────────────────────────
// A block of sums stays in registers: of 32 in AVX-512, or of 16.

constexpr int block_rows = FASTGAN_VECTOR_BYTES == 64 ? 12 : 6, block_columns = 2 * lanes<float>;
constexpr int64_t depth = 128; // so many columns of a left factor, and rows of a right one, are in the L1 together

// A left factor (rows, K): pieces of `depth` columns, in which a block of rows is one after the other. Here and below rows and
// matrices are a vector more apart than they need: a power of two, and what is written together would meet in one set of the L1.
struct Left {
  static constexpr int64_t row = depth + lanes<float>;
  int64_t rows, whole, K, size; // whole: in blocks
  Left(int64_t rows, int64_t K)
      : rows(rows), whole(ceil_div(rows, block_rows) * block_rows), K(K), size(ceil_div(K, depth) * whole * row) {}
  int64_t at(int64_t r, int64_t k) const { return (k / depth * whole + r) * row + k % depth; }
};
// A right factor (K, columns): pieces of `depth` rows, in panels as wide as a block of sums.
struct Right {
  static constexpr int64_t panel = depth * block_columns;
  int64_t K, panels, size;
  Right(int64_t K, int64_t columns)
      : K(K), panels(ceil_div(columns, block_columns)), size(ceil_div(K, depth) * panels * panel + lanes<float>) {}
  int64_t at(int64_t k, int64_t n) const {
    return (k / depth * panels + n / block_columns) * panel + k % depth * block_columns + n % block_columns;
  }
};

// A left factor of which each row of sums is a column (K, columns): likewise, in panels of whole vectors and of whole blocks.
struct LeftOfSums {
  static constexpr int64_t width = 4 * block_rows, panel = depth * width;
  static_assert(width % lanes<float> == 0, "");
  int64_t panels, size;
  LeftOfSums(int64_t K, int64_t columns) : panels(ceil_div(columns, width)), size(ceil_div(K, depth) * panels * panel + lanes<float>) {}
  int64_t at(int64_t k, int64_t r) const { return (k / depth * panels + r / width) * panel + k % depth * width + r % width; }
};

// sums[r·stride + n] = Σ a[r·row + k·step] · b[k·block_columns + n], k < count, of so many rows; or adds that. In two halves: the
// rounding of long sums would show where products cancel, in the middle of a tile. Quarters cost 4 % of the time, eighths 8 %.
template <int rows, int64_t row>
void multiply_rows(const float* a, int64_t step, const float* b, int64_t count, float* sums, int64_t stride, bool adds) {
  constexpr int W = lanes<float>;
  const int64_t half = (count + 1) / 2;
  for (int64_t first = 0; first < count; first += half, adds = true) {
    f32v left[rows], right[rows];
    for (int r = 0; r < rows; ++r) left[r] = right[r] = f32v{};
    for (int64_t k = first; k < smaller(first + half, count); ++k, a += step, b += block_columns) {
      const f32v of_left = load(b), of_right = load(b + W);
      for (int r = 0; r < rows; ++r) {
        const f32v factor = broadcast(a[r * row]);
        left[r] += factor * of_left;
        right[r] += factor * of_right;
      }
    }
    for (int r = 0; r < rows; ++r) {
      float* const to = sums + r * stride;
      store(to, adds ? load(to) + left[r] : left[r]);
      store(to + W, adds ? load(to + W) + right[r] : right[r]);
    }
  }
}
// Of a block, or the thirds of it that `rows` reach.
template <int64_t row>
FASTGAN_INLINE void multiply_block(int64_t rows, const float* a, int64_t step, const float* b, int64_t count, float* sums,
                                   int64_t stride, bool adds) {
  constexpr int third = block_rows / 3;
  const auto multiply = rows > 2 * third ? multiply_rows<block_rows, row>
                        : rows > third   ? multiply_rows<2 * third, row>
                                         : multiply_rows<third, row>;
  multiply(a, step, b, count, sums, stride, adds);
}

void multiply(const Left& left, const Right& right, const float* a, const float* b, float* sums, int64_t stride) {
  for (int64_t k = 0; k < left.K; k += depth)
    for (int64_t panel = 0; panel < right.panels; ++panel)
      for (int64_t r = 0; r < left.rows; r += block_rows)
        multiply_block<Left::row>(left.rows - r, a + left.at(r, k), 1, b + right.at(k, panel * block_columns),
                                  smaller(depth, left.K - k), sums + r * stride + panel * block_columns, stride, k > 0);
}
