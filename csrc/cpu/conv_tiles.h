// Convolution on the matrix unit, channels_last to channels_last.
//
// The rows of a tile are images of the batch at one position. So a tap of the kernel that meets padding is left out, no
// patch is ever written, and any stride, dilation and direction is the same loop over pairs (tap, source position). A small
// batch is cut into horizontal strips that count as images of their own.

constexpr int64_t workspace_bytes = 16 << 20;         // what of an image is packed at a time
constexpr int64_t l2_bytes = 1300 << 10;              // what a thread may work on at a time, of an L2 of 2 MiB

// ── Geometry ─────────────────────────────────────────────────────────────────────────────────────────────────────────

// One axis of a convolution: for each target coordinate the taps of the kernel that meet a source, and which source.
// `scatters`: the targets are the image and the sources the positions of the kernel, not the reverse. The targets of a
// strip are `targets` long; source s of strip i is coordinate i · source_step + source_offset + s, which may lie outside.
struct Axis {
  int64_t targets, sources, source_step, source_offset;
  int64_t most, advance, phases; // taps of one target at most; how far the next target of the same phase sees
  Scratch<int32_t> first, tap, source; // pairs first[t] … first[t + 1] - 1 belong to target t
  Scratch<int32_t> order;              // the targets, those with the same taps together

  Axis(bool scatters, int64_t image, int64_t positions, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation,
       int64_t strips)
      : targets(strip_length(scatters ? image : positions, scatters ? stride : 1, strips)),
        sources(scatters ? positions : image), source_step(scatters ? targets / stride : targets * stride),
        source_offset(0), most(scatters ? ceil_div(kernel, stride) : kernel), advance(scatters ? 1 : stride),
        phases(scatters ? stride : 1), first(targets + 1), tap(targets * kernel), source(targets * kernel), order(targets) {
    const int64_t length = sources;
    const int64_t lowest = scatters ? floor_div(pad - (kernel - 1) * dilation, stride) : -pad;
    if (strips > 1) {
      const int64_t highest = scatters ? floor_div(targets - 1 + pad, stride)
                                       : (targets - 1) * stride - pad + (kernel - 1) * dilation;
      source_offset = lowest;
      sources = highest - lowest + 1;
    }
    int32_t pairs = 0;
    for (int64_t t = 0; t < targets; ++t) {
      first[t] = pairs;
      for (int64_t k = 0; k < kernel; ++k) {
        int64_t s = t * stride - pad + k * dilation;
        if (scatters) {
          const int64_t scaled = t + pad - k * dilation;
          s = floor_div(scaled, stride);
          if (s * stride != scaled) continue;
        }
        if (strips == 1 && (s < 0 || s >= length)) continue;
        tap[pairs] = static_cast<int32_t>(k);
        source[pairs++] = static_cast<int32_t>(s - source_offset);
      }
    }
    first[targets] = pairs;
    for (int64_t phase = 0, i = 0; phase < phases; ++phase)
      for (int64_t t = phase; t < targets; t += phases) order[i++] = static_cast<int32_t>(t);
  }
  // How many sources `count` targets of one phase meet, about.
  int64_t met_by(int64_t count) const { return smaller(sources, count * advance + larger(0, most - advance)); }
  static int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
  // Strips that begin at multiples of the stride see the same pattern of taps.
  static int64_t strip_length(int64_t length, int64_t stride, int64_t strips) {
    return strips == 1 ? length : round_up(ceil_div(length, strips), stride);
  }
};

// How a batch lies in tiles: row r holds strip r % strips of image r / strips.
struct Batch {
  int64_t images, strips, rows, blocks; // rows that are there, blocks of 32 rows that hold them

  // `line_bytes`: of one line of a block of the packed source.
  Batch(const Convolution& g, bool scatters, int64_t line_bytes) : images(g.N), strips(best(g, scatters, line_bytes)) {
    rows = images * strips;
    blocks = ceil_div(rows, block_rows);
  }
  // The fewest strips with which the least work is done on rows that are not there; more, where a block of whole images
  // would be larger than the workspace.
  static int64_t best(const Convolution& g, bool scatters, int64_t line_bytes) {
    const int64_t length = scatters ? g.H : g.OH;
    int64_t chosen = 1, least = INT64_MAX, smallest = INT64_MAX;
    for (int64_t strips = 1; strips <= smaller(length, block_rows); ++strips) {
      const Axis axis(scatters, g.H, g.OH, g.kh, g.stride_h, g.pad_h, g.dilation_h, strips);
      const int64_t work = round_up(g.N * strips, block_rows) * axis.targets;
      const int64_t excess = larger(0, axis.sources * line_bytes - workspace_bytes);
      if (excess < smallest || (excess == smallest && work < least)) chosen = strips, least = work, smallest = excess;
      if (excess == 0 && work == g.N * length) break;
    }
    return chosen;
  }
};

// A channels_last tensor (N, height, width, channels), of which tiles are filled: of strip s the rows
// s · step + offset + (0 … span - 1).
template <class T> struct Source {
  const T* data;
  int64_t height, width, channels, step, offset, span;

  // Where row `r` of the batch has line y of its strip, or null where that is padding.
  const T* line(const Batch& batch, int64_t r, int64_t y) const {
    const int64_t n = r / batch.strips, line = r % batch.strips * step + offset + y;
    if (r >= batch.rows || line < 0 || line >= height) return nullptr;
    return data + (n * height + line) * width * channels;
  }
};

// Packs blocks [begin, end) of the batch: (line, x, block, …), and returns the largest magnitude.
template <class T, class Pack>
uint32_t pack(const Source<T>& source, const Batch& batch, int64_t begin, int64_t end, char* to, Pack pack_block) {
  const int64_t bytes = ceil_div(source.channels, depth) * parts_of<T> * 2 * tile_bytes, blocks = end - begin;
  uint32_t most = 0;
#pragma omp parallel for collapse(2) schedule(static) reduction(max : most)
  for (int64_t y = 0; y < source.span; ++y)
    for (int64_t b = 0; b < blocks; ++b) {
      const T* rows[block_rows];
      for (int r = 0; r < block_rows; ++r) rows[r] = source.line(batch, (begin + b) * block_rows + r, y);
      Largest largest;
      for (int64_t x = 0; x < source.width; ++x)
        pack_block(rows, x * source.channels, source.channels, to + ((y * source.width + x) * blocks + b) * bytes, largest);
      const uint32_t here = largest.of_all();
      most = here > most ? here : most;
    }
  return most;
}

// The weight as right operand, of which `rows` channels are summed over and `columns` come out:
// (block of 32 columns, tap, block of 32 rows, part, 2 tiles, 16 pairs of rows, 16 columns, 2).
template <class T> struct Weight {
  const T* data;
  int64_t rows, row_stride, columns, column_stride, taps, tap_stride;

  int64_t row_blocks() const { return ceil_div(rows, depth); }
  int64_t column_blocks() const { return ceil_div(columns, block_rows); }
  int64_t bytes() const { return column_blocks() * taps * row_blocks() * parts_of<T> * 2 * tile_bytes; }

  // v[r] = the 16 columns from `column` of row `row + r`, for one tap, where the taps lie apart (channels_last).
  FASTGAN_MEMBER void load_rows(int64_t row, int64_t column, int64_t tap, __m512* v) const {
    const T* from = data + row * row_stride + column * column_stride + tap * tap_stride;
    const bool by_row = column_stride == 1;
    for (int i = 0; i < 16; ++i) {
      const bool outside = by_row ? row + i >= rows : column + i >= columns;
      const __mmask16 mask = outside ? 0 : first16(by_row ? columns - column : rows - row);
      v[i] = load16(from + i * (by_row ? row_stride : column_stride), mask);
    }
    if (!by_row) transpose16(v);
  }
  // v[t] = the 16 columns from `column` of one row, for tap `tap + t`, where the taps lie side by side (contiguous).
  FASTGAN_MEMBER void load_taps(int64_t row, int64_t column, int64_t tap, __m512* v) const {
    const T* from = data + row * row_stride + column * column_stride + tap;
    for (int i = 0; i < 16; ++i) {
      const __mmask16 mask = row < rows && column + i < columns ? first16(taps - tap) : 0;
      v[i] = load16(from + i * column_stride, mask);
    }
    transpose16(v);
  }

  uint32_t pack(char* to) const {
    constexpr int Parts = parts_of<T>;
    uint32_t most = 0;
#pragma omp parallel for collapse(2) schedule(static) reduction(max : most)
    for (int64_t c = 0; c < column_blocks(); ++c)
      for (int64_t r = 0; r < row_blocks(); ++r) {
        Largest largest;
        for (int half = 0; half < 2; ++half) {
          const int64_t column = c * block_rows + half * 16;
          char* const first = to + ((c * taps * row_blocks() + r) * Parts * 2 + half) * tile_bytes;
          const int64_t tap_bytes = row_blocks() * Parts * 2 * tile_bytes;
          __m512 v[2][16];
          if (tap_stride == 1)
            for (int pair = 0; pair < depth / 2; ++pair)
              for (int64_t tap = 0; tap < taps; tap += 16) {
                for (int odd = 0; odd < 2; ++odd) load_taps(r * depth + 2 * pair + odd, column, tap, v[odd]);
                for (int t = 0; t < smaller(16, taps - tap); ++t)
                  split_pair<Parts>(v[0][t], v[1][t], first + (tap + t) * tap_bytes + pair * 64, 2 * tile_bytes, largest);
              }
          else
            for (int64_t tap = 0; tap < taps; ++tap) {
              for (int i = 0; i < 2; ++i) load_rows(r * depth + 16 * i, column, tap, v[i]);
              for (int pair = 0; pair < depth / 2; ++pair)
                split_pair<Parts>(v[pair / 8][2 * pair % 16], v[pair / 8][2 * pair % 16 + 1],
                                  first + tap * tap_bytes + pair * 64, 2 * tile_bytes, largest);
            }
        }
        const uint32_t here = largest.of_all();
        most = here > most ? here : most;
      }
    return most;
  }
};

// ── target[t] = bias + Σ source[s] · weight[tap] over the pairs (tap, s) of t: both convolutions ─────────────────────

template <class T> struct Target {
  T* data;
  int64_t height, width, channels, step;

  T* pixel(const Batch& batch, int64_t r, int64_t y, int64_t x) const {
    const int64_t n = r / batch.strips, line = r % batch.strips * step + y;
    return r >= batch.rows || line >= height ? nullptr : data + ((n * height + line) * width + x) * channels;
  }
};

// What one thread works on before it goes on: a run of positions, some blocks of columns, and some of the channels that
// are summed over at a time. Together they have to fit the L2: a core reads the L3 at a quarter of the speed it needs.
struct Blocking {
  int64_t run, columns, channels;

  Blocking(const Axis& rows, const Axis& cols, int64_t column_blocks, int64_t channel_blocks, int64_t step_bytes)
      : run(1), columns(1), channels(1) {
    double least = 1e30;
    const int64_t length = ceil_div(cols.targets, cols.phases), longest = length * ceil_div(rows.targets, rows.phases);
    const int64_t taps = rows.most * cols.most;
    for (int64_t r = smaller(longest, 64); r > 0; r /= 2)
      for (int64_t c = column_blocks; c > 0; c = c == 1 ? 0 : ceil_div(c, 2))
        for (int64_t k = channel_blocks; k > 0; k = k == 1 ? 0 : ceil_div(k, 2)) {
          const bool whole = k == channel_blocks; // then the weight, and the last pixels of a run, stay for the next run
          const int64_t lines = rows.met_by(ceil_div(r, length)), across = smaller(r, length);
          const int64_t pixels = lines * cols.met_by(across), sums = whole ? 0 : r * c * sum_bytes;
          if ((pixels + taps * c) * k * step_bytes + sums > l2_bytes) continue;
          const int64_t read = whole ? lines * across * cols.advance : pixels + taps * c;
          const double traffic = static_cast<double>(read * k * step_bytes + sums / 2) / (r * c * k * taps);
          if (traffic < least) least = traffic, run = r, columns = c, channels = k;
        }
  }
};

template <class T> struct Product {
  static constexpr int Parts = parts_of<T>;
  static constexpr int64_t step_bytes = Parts * 2 * tile_bytes;
  const Batch& batch;
  const Axis &rows, &columns;
  const Source<T>& source;
  const Weight<T>& weight;
  const Target<T>& target;
  const char *packed_source, *packed_weight;
  const float* bias; // of a whole number of blocks of columns
  int64_t begin, blocks, kernel_width;

  // sum (2, 2, 16, 16) += the products of blocks [k0, k1) of the channels, for block `b` of the batch and `c` of columns.
  template <int Columns>
  FASTGAN_MEMBER void add(int64_t b, int64_t y, int64_t x, int64_t c, int64_t k0, int64_t k1, float* sum) const {
    zero_accumulators();
    const int64_t row_blocks = weight.row_blocks();
    for (int32_t i = rows.first[y]; i < rows.first[y + 1]; ++i)
      for (int32_t j = columns.first[x]; j < columns.first[x + 1]; ++j) {
        const int64_t pixel = int64_t(rows.source[i]) * source.width + columns.source[j];
        const int64_t tap = int64_t(rows.tap[i]) * kernel_width + columns.tap[j];
        const char* a = packed_source + (pixel * blocks + b) * row_blocks * step_bytes;
        const char* w = packed_weight + (c * weight.taps + tap) * row_blocks * step_bytes;
        for (int64_t k = k0; k < k1; ++k) step<Parts, Columns>(a + k * step_bytes, w + k * step_bytes);
      }
    if (k0 == 0)
      store_accumulators<Columns>(sum);
    else
      add_accumulators<Columns>(sum);
  }

  void write(const float* sum, int64_t b, int64_t y, int64_t x, int64_t c) const {
    for (int r = 0; r < block_rows; ++r) {
      T* out = target.pixel(batch, (begin + b) * block_rows + r, y, x);
      if (!out) continue;
      for (int j = 0; j < 2; ++j) {
        const int64_t column = c * block_rows + j * 16;
        if (column >= target.channels) break;
        const float* from = sum + ((r / 16 * 2 + j) * 16 + r % 16) * 16;
        const __m512 value = _mm512_load_ps(from) + _mm512_loadu_ps(bias + column);
        store16(out + column, value, first16(target.channels - column));
      }
    }
  }

  void run() const {
    const int64_t column_blocks = weight.column_blocks(), channels = weight.row_blocks();
    const Blocking block(rows, columns, column_blocks, channels, step_bytes);
    const int64_t positions = rows.targets * columns.targets, runs = ceil_div(positions, block.run);
    const int64_t items = ceil_div(column_blocks, block.columns) * blocks * runs;
#pragma omp parallel
    {
      const Tiles tiles;
      const Packed sums(block.run * block.columns * sum_bytes);
#pragma omp for schedule(static)
      for (int64_t item = 0; item < items; ++item) {
        const int64_t b = item / runs % blocks, from = item % runs * block.run, to = smaller(from + block.run, positions);
        const int64_t c0 = item / (runs * blocks) * block.columns, c1 = smaller(c0 + block.columns, column_blocks);
        for (int64_t k = 0; k < channels; k += block.channels)
          for (int64_t c = c0; c < c1; ++c)
            for (int64_t i = from; i < to; ++i) {
              float* sum = reinterpret_cast<float*>(sums.data + ((c - c0) * block.run + i - from) * sum_bytes);
              const int64_t y = rows.order[i / columns.targets], x = columns.order[i % columns.targets];
              const int64_t end = smaller(k + block.channels, channels);
              if (weight.columns - c * block_rows > 16)
                add<2>(b, y, x, c, k, end, sum);
              else
                add<1>(b, y, x, c, k, end, sum);
              if (end == channels) write(sum, b, y, x, c);
            }
      }
    }
  }
};

template <class T> bool convolve(const Convolution& g, bool scatters, const void* from, const void* weight, const void* bias, void* to) {
  const int64_t width = scatters ? g.OW : g.W, channels = scatters ? g.O : g.C;
  const Batch batch(g, scatters, width * ceil_div(channels, depth) * Product<T>::step_bytes);
  const Axis rows(scatters, g.H, g.OH, g.kh, g.stride_h, g.pad_h, g.dilation_h, batch.strips);
  const Axis columns(scatters, g.W, g.OW, g.kw, g.stride_w, g.pad_w, g.dilation_w, 1);
  const Source<T> source{static_cast<const T*>(from), scatters ? g.OH : g.H, width, channels,
                         rows.source_step, rows.source_offset, rows.sources};
  const Target<T> target{static_cast<T*>(to), scatters ? g.H : g.OH, columns.targets, scatters ? g.C : g.O, rows.targets};
  const int64_t taps = g.kh * g.kw;
  const Weight<T> w = scatters ? Weight<T>{static_cast<const T*>(weight), g.O, g.weight_o, g.C, g.weight_c, taps, g.weight_tap}
                               : Weight<T>{static_cast<const T*>(weight), g.C, g.weight_c, g.O, g.weight_o, taps, g.weight_tap};
  const Packed packed_weight(w.bytes());
  const uint32_t largest = w.pack(packed_weight.data);
  const Scratch<float> offset(w.column_blocks() * block_rows);
  for (int64_t c = 0; c < w.column_blocks() * block_rows; ++c)
    offset[c] = bias && c < target.channels ? scalar(static_cast<const T*>(bias)[c]) : 0;

  const int64_t block_bytes = source.span * source.width * w.row_blocks() * Product<T>::step_bytes;
  const int64_t blocks = smaller(batch.blocks, larger(1, workspace_bytes / block_bytes));
  const Packed packed_source(blocks * block_bytes);
  for (int64_t begin = 0; begin < batch.blocks; begin += blocks) {
    const int64_t end = smaller(begin + blocks, batch.blocks);
    if (!splits(pack(source, batch, begin, end, packed_source.data, pack_rows<T>), largest)) return false;
    Product<T>{batch, rows, columns, source, w, target, packed_source.data, packed_weight.data, offset.data, begin,
               end - begin, g.kw}.run();
  }
  return true;
}

// ── grad_weight[tap] = Σ small[position]ᵀ · image[source] over the pairs (tap, source) of all positions ──────────────

template <class T> struct WeightGrad {
  static constexpr int Parts = parts_of<T>;
  static constexpr int64_t step_bytes = Parts * 2 * tile_bytes;
  const Axis &rows, &columns;
  const Convolution& g;
  const char *small, *image;
  float* sums; // (row of the kernel, block of 32 of O, block of 32 of C, column of the kernel, 2, 2, 16, 16)
  int64_t blocks;

  int64_t blocks_of_small() const { return ceil_div(g.O, block_rows); }
  int64_t blocks_of_image() const { return ceil_div(g.C, block_rows); }

  // sum += what positions [x0, x1) of line y, and block `b` of the batch, give one tap.
  template <int Columns>
  FASTGAN_MEMBER void add(int32_t line, int64_t kx, int64_t o, int64_t c, int64_t y, int64_t x0, int64_t x1, int64_t b,
                          float* sum) const {
    zero_accumulators();
    for (int64_t x = x0; x < x1; ++x)
      for (int32_t j = columns.first[x]; j < columns.first[x + 1]; ++j)
        if (columns.tap[j] == kx)
          step<Parts, Columns>(
              small + (((y * columns.targets + x) * blocks + b) * blocks_of_small() + o) * step_bytes,
              image + (((int64_t(line) * g.W + columns.source[j]) * blocks + b) * blocks_of_image() + c) * step_bytes);
    add_accumulators<Columns>(sum);
  }

  // A thread keeps the sums of some blocks of O and C in its L2 and goes through all positions for them: no sum depends on
  // how many threads there are.
  void run() const {
    const int64_t O = blocks_of_small(), C = blocks_of_image(), most = larger(1, (l2_bytes - l2_bytes / 2) * 4 / 5 / (g.kw * sum_bytes));
    int64_t os = O, cs = C;
    while (os * cs > most || (os * cs > 1 && g.kh * ceil_div(O, os) * ceil_div(C, cs) < omp_get_max_threads())) {
      int64_t& halved = os > cs * columns.advance || cs == 1 ? os : cs; // whichever reads more
      halved = ceil_div(halved, 2);
    }
    const int64_t length = larger(1, smaller(columns.targets, l2_bytes / 2 / ((os + cs * columns.advance) * step_bytes)));
    const int64_t o_groups = ceil_div(O, os), c_groups = ceil_div(C, cs), items = g.kh * o_groups * c_groups;
#pragma omp parallel
    {
      const Tiles tiles;
#pragma omp for schedule(static)
      for (int64_t item = 0; item < items; ++item) {
        const int64_t ky = item / (o_groups * c_groups), o0 = item / c_groups % o_groups * os, c0 = item % c_groups * cs;
        for (int64_t y = 0; y < rows.targets; ++y)
          for (int32_t i = rows.first[y]; i < rows.first[y + 1]; ++i) {
            if (rows.tap[i] != ky) continue;
            for (int64_t b = 0; b < blocks; ++b)
              for (int64_t x = 0; x < columns.targets; x += length)
                for (int64_t o = o0; o < smaller(o0 + os, O); ++o)
                  for (int64_t c = c0; c < smaller(c0 + cs, C); ++c)
                    for (int64_t kx = 0; kx < g.kw; ++kx) {
                      float* sum = sums + (((ky * O + o) * C + c) * g.kw + kx) * 1024;
                      const int64_t end = smaller(x + length, columns.targets);
                      if (g.C - c * block_rows > 16)
                        add<2>(rows.source[i], kx, o, c, y, x, end, b, sum);
                      else
                        add<1>(rows.source[i], kx, o, c, y, x, end, b, sum);
                    }
          }
      }
    }
  }

  // The sums as grad_weight (O, C, kh·kw), contiguous.
  void write(T* grad) const {
    const int64_t O = blocks_of_small(), C = blocks_of_image(), taps = g.kh * g.kw;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t o = 0; o < g.O; ++o)
      for (int64_t c = 0; c < ceil_div(g.C, 16); ++c)
        for (int64_t tap = 0; tap < taps; tap += 16) {
          __m512 v[16];
          for (int64_t t = tap; t < tap + 16; ++t) {
            const int64_t ky = t / g.kw, kx = t % g.kw, in_block = (o / 16 % 2 * 2 + c % 2) * 256 + o % 16 * 16;
            const float* from = sums + (((ky * O + o / block_rows) * C + c / 2) * g.kw + kx) * 1024 + in_block;
            v[t - tap] = t < taps ? _mm512_loadu_ps(from) : _mm512_setzero_ps();
          }
          transpose16(v);
          for (int64_t i = 0; i < smaller(16, g.C - c * 16); ++i)
            store16(grad + (o * g.C + c * 16 + i) * taps + tap, v[i], first16(taps - tap));
        }
  }
};

template <class T> bool weight_grad(const Convolution& g, const void* small, const void* image, void* grad) {
  const int64_t O = ceil_div(g.O, block_rows), C = ceil_div(g.C, block_rows), step_bytes = WeightGrad<T>::step_bytes;
  const Batch batch(g, false, g.W * C * step_bytes);
  const Axis rows(false, g.H, g.OH, g.kh, g.stride_h, g.pad_h, g.dilation_h, batch.strips);
  const Axis columns(false, g.W, g.OW, g.kw, g.stride_w, g.pad_w, g.dilation_w, 1);
  const Source<T> from_small{static_cast<const T*>(small), g.OH, g.OW, g.O, rows.targets, 0, rows.targets};
  const Source<T> from_image{static_cast<const T*>(image), g.H, g.W, g.C, rows.source_step, rows.source_offset, rows.sources};
  const int64_t small_bytes = from_small.span * g.OW * O * step_bytes, image_bytes = from_image.span * g.W * C * step_bytes;
  const int64_t blocks = smaller(batch.blocks, larger(1, workspace_bytes / larger(small_bytes, image_bytes)));
  const Packed packed_small(blocks * small_bytes), packed_image(blocks * image_bytes), sums(g.kh * g.kw * C * O * sum_bytes);
  __builtin_memset(sums.data, 0, g.kh * g.kw * C * O * sum_bytes);
  for (int64_t begin = 0; begin < batch.blocks; begin += blocks) {
    const int64_t end = smaller(begin + blocks, batch.blocks);
    const uint32_t largest = pack(from_small, batch, begin, end, packed_small.data, pack_transposed<T>);
    if (!splits(pack(from_image, batch, begin, end, packed_image.data, pack_paired<T>), largest)) return false;
    const WeightGrad<T> product{rows, columns, g, packed_small.data, packed_image.data, reinterpret_cast<float*>(sums.data),
                                end - begin};
    product.run();
    if (end == batch.blocks) product.write(static_cast<T*>(grad));
  }
  return true;
}

// The part of the unit's work that is not on padding of rows, of channels that are summed over, or of those that come out.
double fill(const Convolution& g, bool scatters, bool of_weight) {
  const Batch batch(g, scatters, 0);
  const Axis axis(scatters, g.H, g.OH, g.kh, g.stride_h, g.pad_h, g.dilation_h, batch.strips);
  const int64_t O = scatters || of_weight ? round_up(g.O, depth) : round_up(g.O, tile_rows);
  const int64_t C = scatters || of_weight ? round_up(g.C, tile_rows) : round_up(g.C, depth);
  const double rows = static_cast<double>(batch.blocks * block_rows * axis.targets);
  return g.N * (scatters ? g.H : g.OH) / rows * g.O / O * g.C / C;
}

// False where float32 does not split: then nothing, or not everything, has been written.
bool image_to_positions(const Convolution& g, const void* image, const void* weight, const void* bias, void* positions) {
  return g.dtype == DType::float32 ? convolve<float>(g, false, image, weight, bias, positions)
                                   : convolve<bfloat16>(g, false, image, weight, bias, positions);
}
bool positions_to_image(const Convolution& g, const void* positions, const void* weight, const void* bias, void* image) {
  return g.dtype == DType::float32 ? convolve<float>(g, true, positions, weight, bias, image)
                                   : convolve<bfloat16>(g, true, positions, weight, bias, image);
}
bool grad_of_weight(const Convolution& g, const void* positions, const void* image, void* grad) {
  return g.dtype == DType::float32 ? weight_grad<float>(g, positions, image, grad)
                                   : weight_grad<bfloat16>(g, positions, image, grad);
}
