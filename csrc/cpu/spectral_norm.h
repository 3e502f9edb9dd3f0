// Spectral norms of many weights, W / σ, σ = uᵀ W v: all power iterations, sums and quotients in one parallel region.
//
// Memory is lines, L of C × B elements, and their matrix has a row for each (l, b) and a column for each c. Of a weight
// (1, D, B) each row is a line, of C = B elements; the L = A lines of a weight (A, D, B), C = D, are the transposed matrix.
// Both products of a power iteration walk along the lines: that with the columns' vector gives a number for each row, that
// with the rows' a sum of lines.
//
// A weight is cut into blocks of lines, of a size that depends on its shape alone. What a block sums up is merged in order:
// the bits do not depend on the number of threads. Each thread has the same blocks in all passes, of as many weights at a
// time as fit its cache: so a pass finds there what the one before has read.

struct Lines {
  int64_t L, C, B;
  bool transposed;
  int64_t length() const { return C * B; }
  int64_t size() const { return L * C * B; }
};
FASTGAN_INLINE Lines lines_of(const SpectralWeight& w) {
  return w.A == 1 && w.B > 1 ? Lines{w.D, w.B, 1, false} : Lines{w.A, w.D, w.B, true};
}

struct LineBlock {
  int64_t weight, first, last; // lines
  int64_t sums;                // where the sum of its lines lies
};

constexpr int64_t column_chunk = 1024;
constexpr int64_t spectral_threshold = 4 * parallel_threshold; // threads wait for each other several times

// Which blocks there are, and which weights are worked on together.
struct SpectralPlan {
  static constexpr int64_t block_elements = 1 << 16, least_lines = 16, most_lines = 512; // a sum of lines costs as much as one
  static constexpr int64_t cache_bytes = 1 << 20; // of what a thread may work on at a time

  int64_t count, elements = 0, blocks_count = 0, most_sums = 0, parts_count = 0;
  Scratch<Lines> lines;
  Scratch<int64_t> first_block, first_part, group_end; // of each weight; the last group it is in ends before weight …
  Scratch<LineBlock> blocks;

  static int64_t lines_in_block(const Lines& l) {
    return smaller(larger(block_elements / larger(l.length(), 1), least_lines), most_lines);
  }
  template <class Weight> static int64_t count_blocks(const Weight* weights, int64_t count) {
    int64_t blocks = 0;
    for (int64_t w = 0; w < count; ++w) {
      const Lines l = lines_of(weights[w]);
      blocks += ceil_div(l.L, lines_in_block(l));
    }
    return blocks;
  }

  // `padding`: elements that follow each sum of lines.
  template <class Weight>
  SpectralPlan(const Weight* weights, int64_t count, int64_t element_bytes, int64_t padding)
      : count(count), lines(count), first_block(count + 1), first_part(count + 1), group_end(count),
        blocks(count_blocks(weights, count)) {
    const int64_t most_bytes = cache_bytes * omp_get_max_threads();
    int64_t group = 0, group_bytes = 0, sums = 0;
    for (int64_t w = 0; w < count; ++w) {
      const Lines l = lines[w] = lines_of(weights[w]);
      if (w > group && group_bytes + l.size() * element_bytes > most_bytes) {
        for (; group < w; ++group) group_end[group] = w;
        group_bytes = sums = 0;
      }
      group_bytes += l.size() * element_bytes;
      elements += l.size();
      first_block[w] = blocks_count;
      first_part[w] = parts_count;
      for (int64_t line = 0; line < l.L; line += lines_in_block(l)) {
        blocks[blocks_count++] = {w, line, smaller(line + lines_in_block(l), l.L), sums};
        sums += l.C + padding;
      }
      most_sums = larger(most_sums, sums);
      parts_count += larger(blocks_count - first_block[w], ceil_div(l.C, column_chunk));
    }
    for (; group < count; ++group) group_end[group] = count;
    first_block[count] = blocks_count;
    first_part[count] = parts_count;
  }

  // Calls f(index, block) for the blocks of weights [from, to) that are this thread's.
  template <class F> void for_own_blocks(int64_t from, int64_t to, F f) const {
    int64_t total = 0, before = 0;
    for (int64_t w = from; w < to; ++w) total += lines[w].size();
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    for (int64_t b = first_block[from]; b < first_block[to]; ++b) {
      const LineBlock& block = blocks[b];
      const int64_t size = (block.last - block.first) * lines[block.weight].length();
      if ((2 * before + size) * threads / (2 * total) == thread) f(b, block);
      before += size;
    }
  }
  // Calls f(weight, chunk, first, last) for the chunks of columns of weights [from, to) that are this thread's.
  template <class F> void for_own_chunks(int64_t from, int64_t to, F f) const {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    int64_t turn = 0;
    for (int64_t w = from; w < to; ++w)
      for (int64_t c = 0; c * column_chunk < lines[w].C; ++c)
        if (turn++ % threads == thread)
          f(w, c, c * column_chunk, smaller((c + 1) * column_chunk, lines[w].C));
  }
};

// Σ p·q of n elements, which lie before `p_end` and `q_end`.
template <class Acc, class P, class Q>
FASTGAN_INLINE Doubles<Acc> dot_product(const P* p, const P* p_end, const Q* q, const Q* q_end, int64_t n) {
  constexpr int W = lanes<Acc>, segment = run * unroll * W;
  Doubles<Acc> total = {};
  for (int64_t first = 0; first < n; first += segment) {
    const int64_t last = smaller(first + segment, n);
    typename Lanes<Acc>::vec parts[unroll] = {};
    int64_t i = first;
    for (; i + unroll * W <= last; i += unroll * W)
      for (int j = 0; j < unroll; ++j) parts[j] += load(p + i + j * W) * load(q + i + j * W);
    for (; i < last; i += W) parts[0] += load_within(p + i, last - i, p_end) * load_within(q + i, last - i, q_end);
    total += Doubles<Acc>::of((parts[0] + parts[1]) + (parts[2] + parts[3]));
  }
  return total;
}

// y += Σ factors[r]·line r, of R lines of n elements. y may be read and written a vector further.
template <int R, class T>
FASTGAN_INLINE void add_lines(acc_t<T>* y, const T* lines, const T* end, const acc_t<T>* factors, int64_t n) {
  constexpr int W = lanes<acc_t<T>>;
  for (int64_t i = 0; i < n; i += W) {
    vec_t<T> sum = load(y + i);
    for (int r = 0; r < R; ++r) {
      sum += broadcast<acc_t<T>>(factors[r]) * load_within(lines + r * n + i, n - i, end);
      __builtin_prefetch(lines + (R + r) * n + i, 0, 2); // the lines to come, as nothing else is fetched meanwhile
    }
    store(y + i, sum);
  }
}

// Of R lines of (C, B) elements, the W at i of each B: their products with a vector of the C columns, and with one of the rows.
// Both go through the lines side by side, as they lie.
template <class T> struct Strip {
  using Acc = acc_t<T>;
  using vec = vec_t<T>;
  const T *lines, *end;
  int64_t C, B, i;

  vec load_at(int64_t line, int64_t c) const { return load_within(lines + (line * C + c) * B + i, B - i, end); }

  template <int R> void multiply(const Acc* columns, Doubles<Acc>* products) const {
    for (int r = 0; r < R; ++r) products[r] = Doubles<Acc>{};
    for (int64_t first = 0; first < C; first += run) {
      const int64_t last = smaller(first + run, C);
      vec sums[R] = {};
      for (int64_t c = first; c < last; ++c)
        for (int r = 0; r < R; ++r) sums[r] += broadcast<Acc>(columns[c]) * load_at(r, c);
      for (int r = 0; r < R; ++r) products[r] += Doubles<Acc>::of(sums[r]);
    }
  }
  template <int R> void add(const vec* rows, int64_t first, int64_t last, vec* sums) const {
    for (int64_t c = first; c < last; ++c)
      for (int r = 0; r < R; ++r) sums[c - first] += rows[r] * load_at(r, c);
  }
};

template <class T> struct SpectralNorm {
  using Acc = acc_t<T>;
  static constexpr int W = lanes<Acc>;

  const SpectralForward* weights;
  const SpectralPlan plan;
  const double eps;
  const bool streams; // W / σ, which no cache holds beside the weights until it is read
  const Scratch<Acc> sums;
  const Scratch<double> u_parts, v_parts; // Σ u², Σ v² of a block or chunk: the norms of what is not normalised yet

  SpectralNorm(const SpectralForward* weights, int64_t count, double eps)
      : weights(weights), plan(weights, count, sizeof(T), W), eps(eps),
        streams(exceeds_caches<T>(2 * plan.elements)), sums(plan.most_sums), u_parts(plan.parts_count),
        v_parts(plan.parts_count) {}

  const T* elements(int64_t w) const { return static_cast<const T*>(weights[w].weight); }
  // Of the matrix whose rows are lines: the vectors given for rows and columns, and the new ones.
  const Acc* given(int64_t w, bool rows) const {
    return static_cast<const Acc*>(rows != plan.lines[w].transposed ? weights[w].u : weights[w].v);
  }
  Acc* made(int64_t w, bool rows) const {
    return static_cast<Acc*>(rows != plan.lines[w].transposed ? weights[w].new_u : weights[w].new_v);
  }
  // Whether u, or v, is a product with each row.
  bool has_rows(int64_t w, bool is_u) const { return is_u != plan.lines[w].transposed; }

  double squares(int64_t w, bool is_u) const {
    const int64_t n = has_rows(w, is_u) ? plan.first_block[w + 1] - plan.first_block[w]
                                        : ceil_div(plan.lines[w].C, column_chunk);
    const double* parts = (is_u ? u_parts : v_parts).data + plan.first_part[w];
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += parts[i];
    return total;
  }
  double norm(int64_t w, bool is_u) const {
    const double norm = __builtin_sqrt(squares(w, is_u));
    return norm < eps ? eps : norm; // a NaN stays one
  }

  // The products of lines [first, last) with the columns' vector, each given to f(row, product).
  template <class F> void multiply_lines(int64_t w, int64_t first, int64_t last, const Acc* columns, const F& f) const {
    const Lines& l = plan.lines[w];
    const T *begin = elements(w), *end = begin + l.size();
    if (l.B == 1) {
      for (int64_t line = first; line < last; ++line)
        f(line, sum<Acc>(dot_product<Acc>(begin + line * l.C, end, columns, columns + l.C, l.C)));
      return;
    }
    for (int64_t i = 0; i < l.B; i += W) {
      Doubles<Acc> products[unroll];
      const auto multiply = [&](int64_t line, int count) {
        for (int r = 0; r < count; ++r)
          for (int64_t b = i; b < smaller(i + W, l.B); ++b) f((line + r) * l.B + b, products[r][b - i]);
      };
      int64_t line = first;
      for (; line + unroll <= last; line += unroll) {
        Strip<T>{begin + line * l.length(), end, l.C, l.B, i}.template multiply<unroll>(columns, products);
        multiply(line, unroll);
      }
      for (; line < last; ++line) {
        Strip<T>{begin + line * l.length(), end, l.C, l.B, i}.template multiply<1>(columns, products);
        multiply(line, 1);
      }
    }
  }

  // Adds lines [first, last), each row times its factor, to a vector of the columns.
  void add_lines_to(int64_t w, int64_t first, int64_t last, const Acc* factors, Acc* to) const {
    const Lines& l = plan.lines[w];
    const T *begin = elements(w), *end = begin + l.size();
    if (l.B == 1) {
      int64_t line = first;
      for (; line + 4 <= last; line += 4) add_lines<4>(to, begin + line * l.C, end, factors + line, l.C);
      for (; line < last; ++line) add_lines<1>(to, begin + line * l.C, end, factors + line, l.C);
      return;
    }
    constexpr int64_t width = 64; // columns whose sums the cache nearest to the core has
    for (int64_t c = 0; c < l.C; c += width) {
      const int64_t past = smaller(c + width, l.C);
      vec_t<T> sums[width] = {};
      for (int64_t i = 0; i < l.B; i += W) {
        const auto rows_at = [&](int64_t line) {
          return load_within(factors + line * l.B + i, l.B - i, factors + l.L * l.B);
        };
        int64_t line = first;
        for (; line + unroll <= last; line += unroll) {
          vec_t<T> rows[unroll];
          for (int r = 0; r < unroll; ++r) rows[r] = rows_at(line + r);
          Strip<T>{begin + line * l.length(), end, l.C, l.B, i}.template add<unroll>(rows, c, past, sums);
        }
        for (; line < last; ++line) {
          const vec_t<T> row = rows_at(line);
          Strip<T>{begin + line * l.length(), end, l.C, l.B, i}.template add<1>(&row, c, past, sums);
        }
      }
      for (int64_t at = c; at < past; ++at)
        to[at] += static_cast<Acc>(sum<Acc>(sums[at - c]));
    }
  }

  // What the blocks have summed, times a factor; its Σ of squares.
  double merge(int64_t w, int64_t first, int64_t last, double factor) const {
    Acc* to = made(w, false);
    Doubles<Acc> total = {};
    for (int64_t i = first; i < last; i += W) {
      typename Lanes<Acc>::vec sum = {};
      for (int64_t b = plan.first_block[w]; b < plan.first_block[w + 1]; ++b) sum += load(sums.data + plan.blocks[b].sums + i);
      sum *= broadcast<Acc>(static_cast<Acc>(factor));
      store(to + i, sum, static_cast<int>(smaller(W, last - i)));
      Doubles<Acc> squares = Doubles<Acc>::of(sum); // zero beyond the last column
      squares *= squares;
      total += squares;
    }
    return sum<Acc>(total);
  }

  // One iteration of weights [from, to): u = W v and v = Wᵀ u. A vector that was made is normalised as it is used next.
  void iterate(int64_t from, int64_t to, bool is_first) const {
    const auto v_of = [&](int64_t w, bool rows) { return is_first ? given(w, rows) : made(w, rows); };
    const auto v_factor = [&](int64_t w) { return is_first ? 1 : 1 / norm(w, false); };
    bool transposes = false;
    for (int64_t w = from; w < to; ++w) transposes |= plan.lines[w].transposed;

    plan.for_own_blocks(from, to, [&](int64_t b, const LineBlock& block) {
      const int64_t w = block.weight;
      const Lines& l = plan.lines[w];
      Acc* to = sums.data + block.sums;
      __builtin_memset(to, 0, (l.C + W) * sizeof(Acc));
      if (l.transposed) return add_lines_to(w, block.first, block.last, v_of(w, true), to);
      // Wᵀ (W v) adds each row as often as it is long in v: both products of it at once, while the cache has it. The length of
      // W v comes out in the end.
      constexpr int64_t step = 4;
      Acc* products = made(w, true);
      const double factor = v_factor(w);
      double squares = 0;
      for (int64_t d = block.first; d < block.last; d += step) {
        const int64_t last = smaller(d + step, block.last);
        multiply_lines(w, d, last, v_of(w, false), [&](int64_t row, double product) {
          products[row] = static_cast<Acc>(product * factor);
          squares += product * factor * product * factor;
        });
        add_lines_to(w, d, last, products, to);
      }
      u_parts[plan.first_part[w] + b - plan.first_block[w]] = squares;
    });
#pragma omp barrier
    plan.for_own_chunks(from, to, [&](int64_t w, int64_t chunk, int64_t first, int64_t last) {
      const bool transposed = plan.lines[w].transposed;
      (transposed ? u_parts : v_parts)[plan.first_part[w] + chunk] =
          merge(w, first, last, transposed ? v_factor(w) : 1 / norm(w, true));
    });
#pragma omp barrier
    if (!transposes) return;
    plan.for_own_blocks(from, to, [&](int64_t b, const LineBlock& block) {
      const int64_t w = block.weight;
      if (!plan.lines[w].transposed) return;
      Acc* products = made(w, true);
      const double factor = 1 / norm(w, true);
      double squares = 0;
      multiply_lines(w, block.first, block.last, made(w, false), [&](int64_t row, double product) {
        products[row] = static_cast<Acc>(product * factor);
        squares += product * factor * product * factor;
      });
      v_parts[plan.first_part[w] + b - plan.first_block[w]] = squares;
    });
#pragma omp barrier
  }

  // The parts of uᵀ W v, where no iteration has left them in v.
  void project(int64_t from, int64_t to) const {
    plan.for_own_blocks(from, to, [&](int64_t b, const LineBlock& block) {
      const int64_t w = block.weight;
      const Acc* rows = given(w, true);
      double total = 0;
      multiply_lines(w, block.first, block.last, given(w, false), [&](int64_t d, double product) { total += rows[d] * product; });
      u_parts[plan.first_part[w] + b - plan.first_block[w]] = total;
    });
#pragma omp barrier
  }

  void scale_vector(Acc* vector, int64_t first, int64_t last, double factor) const {
    for (int64_t i = first; i < last; ++i) vector[i] = static_cast<Acc>(vector[i] * factor);
  }

  void finish(int64_t from, int64_t to, bool iterated, Acc* sigma) const {
    plan.for_own_blocks(from, to, [&](int64_t b, const LineBlock& block) {
      const int64_t w = block.weight;
      const Lines& l = plan.lines[w];
      // uᵀ W v = (Wᵀ u)·v, of which v is the direction.
      double value = iterated ? squares(w, false) / norm(w, false) : 0;
      if (!iterated)
        for (int64_t i = plan.first_block[w]; i < plan.first_block[w + 1]; ++i)
          value += u_parts[plan.first_part[w] + i - plan.first_block[w]];
      if (b == plan.first_block[w]) sigma[w] = static_cast<Acc>(value);
      const vec_t<T> divisor = broadcast<Acc>(static_cast<Acc>(value)); // whose inverse may be none, where it is denormal
      T* to = static_cast<T*>(weights[w].normalised);
      const int64_t last = block.last * l.length();
      for (int64_t i = block.first * l.length(); i < last; i += W) {
        const int n = static_cast<int>(smaller(W, last - i));
        store_or_stream(to + i, load(elements(w) + i, n) / divisor, n, streams);
      }
      if (iterated) scale_vector(made(w, true), block.first * l.B, block.last * l.B, 1 / norm(w, !l.transposed));
    });
    if (!iterated) return;
    plan.for_own_chunks(from, to, [&](int64_t w, int64_t, int64_t first, int64_t last) {
      scale_vector(made(w, false), first, last, 1 / norm(w, plan.lines[w].transposed));
    });
  }

  void compute(int64_t iterations, Acc* sigma) const {
#pragma omp parallel if (plan.elements > spectral_threshold)
    {
      for (int64_t from = 0, to; from < plan.count; from = to) {
        to = plan.group_end[from];
        for (int64_t i = 0; i < iterations; ++i) iterate(from, to, i == 0);
        if (iterations == 0) project(from, to);
        finish(from, to, iterations > 0, sigma);
      }
      finish_streams();
    }
  }
};

// u vᵀ as it lies in lines [first, last): to each piece of memory, n elements from `start`, f is given what its part of one
// vector is multiplied with, and that part, which ends before `end`.
template <class Acc, class F>
FASTGAN_INLINE void for_pieces(const SpectralWeight& w, const Lines& l, int64_t first, int64_t last, const F& f) {
  const Acc* rows = static_cast<const Acc*>(l.transposed ? w.v : w.u);
  const Acc* columns = static_cast<const Acc*>(l.transposed ? w.u : w.v);
  for (int64_t line = first; line < last; ++line) {
    if (l.B == 1)
      f(line * l.C, l.C, rows[line], columns, columns + l.C);
    else
      for (int64_t c = 0; c < l.C; ++c)
        f((line * l.C + c) * l.B, l.B, columns[c], rows + line * l.B, rows + l.L * l.B);
  }
}

// grad_weight = grad / σ − <grad, W> / σ² · u vᵀ
template <class T> void backward(const SpectralBackward* weights, int64_t count, const void* sigma) {
  using Acc = acc_t<T>;
  constexpr int W = lanes<Acc>;
  const SpectralPlan plan(weights, count, 2 * sizeof(T), 0);
  const bool streams = exceeds_caches<T>(3 * plan.elements);
  const Scratch<double> products(plan.blocks_count);
#pragma omp parallel if (plan.elements > spectral_threshold)
  {
    for (int64_t from = 0, to; from < count; from = to) {
      to = plan.group_end[from];
      plan.for_own_blocks(from, to, [&](int64_t b, const LineBlock& block) {
        const SpectralBackward& w = weights[block.weight];
        const Lines& l = plan.lines[block.weight];
        const T *grad = static_cast<const T*>(w.grad), *weight = static_cast<const T*>(w.weight);
        const int64_t first = block.first * l.length(), n = (block.last - block.first) * l.length();
        products[b] = sum<Acc>(dot_product<Acc>(grad + first, grad + l.size(), weight + first, weight + l.size(), n));
      });
#pragma omp barrier
      plan.for_own_blocks(from, to, [&](int64_t, const LineBlock& block) {
        const SpectralBackward& w = weights[block.weight];
        const Lines& l = plan.lines[block.weight];
        const T* grad = static_cast<const T*>(w.grad);
        double product = 0;
        for (int64_t b = plan.first_block[block.weight]; b < plan.first_block[block.weight + 1]; ++b) product += products[b];
        const double inverse = 1 / static_cast<double>(static_cast<const Acc*>(sigma)[block.weight]);
        const vec_t<T> factor = broadcast<Acc>(static_cast<Acc>(inverse));
        const auto finish = [&](int64_t start, int64_t length, Acc scalar, const Acc* vector, const Acc* end) {
          const vec_t<T> outer = broadcast<Acc>(static_cast<Acc>(product * inverse * inverse * scalar));
          for (int64_t i = 0; i < length; i += W) {
            const int n = static_cast<int>(smaller(W, length - i));
            const vec_t<T> g = load_within(grad + start + i, n, grad + l.size());
            store_or_stream(static_cast<T*>(w.grad_weight) + start + i, g * factor - outer * load_within(vector + i, n, end), n, streams);
          }
        };
        for_pieces<Acc>(w, l, block.first, block.last, finish);
      });
    }
    finish_streams();
  }
}

// Of <gg, grad_weight>, with c = uᵀ gg v:
//   g_grad = gg / σ − c / σ² · W
//   g_weight = −c / σ² · grad + (2 <grad, W> c / σ³ − <gg, grad> / σ²) · u vᵀ
template <class T> void double_backward(const SpectralDoubleBackward* weights, int64_t count, const void* sigma) {
  using Acc = acc_t<T>;
  constexpr int W = lanes<Acc>;
  struct Products {
    double grad_weight, gg_grad, gg_outer;
  };
  const SpectralPlan plan(weights, count, 3 * sizeof(T), 0);
  const Scratch<Products> products(plan.blocks_count);
#pragma omp parallel if (plan.elements > spectral_threshold)
  for (int64_t from = 0, to; from < count; from = to) {
    to = plan.group_end[from];
    plan.for_own_blocks(from, to, [&](int64_t b, const LineBlock& block) {
      const SpectralDoubleBackward& w = weights[block.weight];
      const Lines& l = plan.lines[block.weight];
      const T *gg = static_cast<const T*>(w.gg), *grad = static_cast<const T*>(w.grad), *weight = static_cast<const T*>(w.weight);
      const int64_t first = block.first * l.length(), n = (block.last - block.first) * l.length();
      const T *grad_end = grad + l.size(), *gg_end = gg + l.size();
      const auto grad_weight = dot_product<Acc>(grad + first, grad_end, weight + first, weight + l.size(), n);
      const auto gg_grad = dot_product<Acc>(gg + first, gg_end, grad + first, grad_end, n);
      Doubles<Acc> gg_outer = {};
      const auto add = [&](int64_t start, int64_t length, Acc scalar, const Acc* vector, const Acc* end) {
        Doubles<Acc> product = dot_product<Acc>(gg + start, gg_end, vector, end, length);
        product *= scalar;
        gg_outer += product;
      };
      for_pieces<Acc>(w, l, block.first, block.last, add);
      products[b] = {sum<Acc>(grad_weight), sum<Acc>(gg_grad), sum<Acc>(gg_outer)};
    });
#pragma omp barrier
    plan.for_own_blocks(from, to, [&](int64_t, const LineBlock& block) {
      const SpectralDoubleBackward& w = weights[block.weight];
      const Lines& l = plan.lines[block.weight];
      const T *gg = static_cast<const T*>(w.gg), *grad = static_cast<const T*>(w.grad), *weight = static_cast<const T*>(w.weight);
      Products p = {0, 0, 0};
      for (int64_t b = plan.first_block[block.weight]; b < plan.first_block[block.weight + 1]; ++b) {
        p.grad_weight += products[b].grad_weight;
        p.gg_grad += products[b].gg_grad;
        p.gg_outer += products[b].gg_outer;
      }
      const double inverse = 1 / static_cast<double>(static_cast<const Acc*>(sigma)[block.weight]);
      const double outer = (2 * p.grad_weight * p.gg_outer * inverse - p.gg_grad) * inverse * inverse;
      const vec_t<T> factor = broadcast<Acc>(static_cast<Acc>(inverse));
      const vec_t<T> across = broadcast<Acc>(static_cast<Acc>(p.gg_outer * inverse * inverse));
      const auto finish = [&](int64_t start, int64_t length, Acc scalar, const Acc* vector, const Acc* end) {
        const vec_t<T> of_outer = broadcast<Acc>(static_cast<Acc>(outer * scalar));
        for (int64_t i = 0; i < length; i += W) {
          const int n = static_cast<int>(smaller(W, length - i));
          const auto part = [&](const T* of) { return load_within(of + start + i, n, of + l.size()); };
          store(static_cast<T*>(w.g_grad) + start + i, part(gg) * factor - across * part(weight), n);
          store(static_cast<T*>(w.g_weight) + start + i, of_outer * load_within(vector + i, n, end) - across * part(grad), n);
        }
      };
      for_pieces<Acc>(w, l, block.first, block.last, finish);
    });
  }
}

template <class T>
void normalise_spectrally(const SpectralForward* weights, int64_t count, int64_t iterations, double eps, void* sigma) {
  SpectralNorm<T>(weights, count, eps).compute(iterations, static_cast<acc_t<T>*>(sigma));
}

void spectral_norm_forward(DType dtype, const SpectralForward* weights, int64_t count, int64_t iterations, double eps,
                           void* sigma) {
  FASTGAN_BY_DTYPE(normalise_spectrally, (weights, count, iterations, eps, sigma), dtype)
}
void spectral_norm_backward(DType dtype, const SpectralBackward* weights, int64_t count, const void* sigma) {
  FASTGAN_BY_DTYPE(backward, (weights, count, sigma), dtype)
}
void spectral_norm_double_backward(DType dtype, const SpectralDoubleBackward* weights, int64_t count, const void* sigma) {
  FASTGAN_BY_DTYPE(double_backward, (weights, count, sigma), dtype)
}
