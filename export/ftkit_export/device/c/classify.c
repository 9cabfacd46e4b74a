/* Classify images in plain C, without any runtime, or prove that it works here. For Linux-class processors.
 *
 *   classify IMAGE.ppm...                 what the model says of each image (binary PPM, any size)
 *   classify --raw ROWS COLUMNS FILE...   the same of raw frames, in the format the model was exported for
 *   classify --self-check                 replay the golden vectors, time the model; exit 0 or 1
 *
 * model.bin (the weights) must lie beside the program; --golden DIR says where golden/raw is (default: ../../golden/raw
 * from there). Exit codes: 0 done, 1 a check failed, 2 bad input.
 */
#include "model.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

_Bool model_load(const char *path);
void model(const float pixels[1][3][SIZE][SIZE], float logits[1][CLASSES], float embedding[1][FEATURES]);

enum { CHANNELS = FORMAT == RGB || FORMAT == BGR ? 3 : 1 }; /* of a frame */
typedef struct { int rows, columns; uint8_t *rgb; } Image;

static void fail(const char *where, const char *what) {
  fprintf(stderr, "error: %s: %s\n", where, what);
  exit(2);
}

static void *need(size_t bytes) {
  void *found = malloc(bytes ? bytes : 1);
  if (!found) fail("memory", "expected enough of it, found too little. Try a smaller image");
  return found;
}

static uint8_t *read_file(const char *path, size_t *size) {
  FILE *file = fopen(path, "rb");
  if (!file) fail(path, "expected a readable file, found none. Check the path");
  fseek(file, 0, SEEK_END);
  *size = (size_t)ftell(file);
  rewind(file);
  uint8_t *data = need(*size);
  if (fread(data, 1, *size, file) != *size) fail(path, "expected to read it whole, found it cut short");
  fclose(file);
  return data;
}

/* A camera's frame to RGB, as the exporter's preprocess.from_frame has it. */
static Image from_frame(const uint8_t *frame, int rows, int columns) {
  Image image = {FORMAT == NV12 ? rows * 2 / 3 : rows, columns, NULL};
  image.rgb = need((size_t)image.rows * columns * 3);
  for (int y = 0; y < image.rows; ++y)
    for (int x = 0; x < columns; ++x) {
      uint8_t *out = image.rgb + 3 * ((size_t)y * columns + x);
      size_t at = (size_t)y * columns + x;
      if (FORMAT == RGB) memcpy(out, frame + 3 * at, 3);
      else if (FORMAT == BGR) for (int c = 0; c < 3; ++c) out[c] = frame[3 * at + 2 - c];
      else if (FORMAT == GREY) memset(out, frame[at], 3);
      else { /* BT.601, limited range */
        const uint8_t *uv = frame + (size_t)(image.rows + y / 2) * columns + x / 2 * 2;
        float luma = 255.0f / 219.0f * (frame[at] - 16.0f), u = uv[0] - 128.0f, v = uv[1] - 128.0f;
        float mixed[3] = {luma + 1.596027f * v, luma - 0.391762f * u - 0.812968f * v, luma + 2.017232f * u};
        for (int c = 0; c < 3; ++c) out[c] = (uint8_t)fminf(255.0f, fmaxf(0.0f, rintf(mixed[c])));
      }
    }
  return image;
}

/* A frame's sides must make sense before they are multiplied: 32-bit processors are welcome. */
static void require_frame(const char *path, int rows, int columns) {
  if (rows < 1 || columns < 1 || rows > 16384 || columns > 16384)
    fail(path, "expected sides of 1 to 16384 pixels, found others");
  if (FORMAT == NV12 && (rows % 3 || columns % 2))
    fail(path, "expected NV12 with even sides (rows = height * 3 / 2), found others. Check rows and columns");
}

static int ppm_number(const uint8_t *data, size_t size, size_t *at) {
  while (*at < size && (data[*at] == ' ' || (data[*at] >= 9 && data[*at] <= 13) || data[*at] == '#'))
    if (data[(*at)++] == '#') while (*at < size && data[*at] != '\n') ++*at;
  int value = 0;
  while (*at < size && data[*at] >= '0' && data[*at] <= '9' && value < 1 << 20) value = value * 10 + data[(*at)++] - '0';
  return value;
}

static Image read_ppm(const char *path) {
  size_t size, at = 2;
  uint8_t *data = read_file(path, &size);
  Image image = {0, 0, NULL};
  int ppm = size > 2 && data[0] == 'P' && data[1] == '6', deepest = 0;
  if (ppm) {
    image.columns = ppm_number(data, size, &at);
    image.rows = ppm_number(data, size, &at);
    deepest = ppm_number(data, size, &at);
  }
  ++at;
  if (image.rows < 1 || image.columns < 1 || image.rows > 16384 || image.columns > 16384)
    fail(path, "expected a whole binary PPM of at most 16384 pixels a side, found none. Convert it first");
  size_t bytes = (size_t)image.rows * image.columns * 3;
  if (!bytes || deepest != 255 || size < at || size - at < bytes)
    fail(path, "expected a whole binary PPM of 8 bits, found none. Convert it first");
  image.rgb = need(bytes);
  memcpy(image.rgb, data + at, bytes);
  free(data);
  if (FORMAT == NV12) fail(path, "expected a raw NV12 frame, which this model was proven on, found a PPM. Try --raw ROWS COLUMNS");
  if (FORMAT == GREY)
    for (uint8_t *rgb = image.rgb; rgb < image.rgb + bytes; rgb += 3) memset(rgb, (19595 * rgb[0] + 38470 * rgb[1] + 7471 * rgb[2] + 32768) >> 16, 3);
  return image;
}

/* One pass of a bilinear, antialiased resize along rows (stride 3) or columns, in Pillow's fixed point. */
static void resize_line(const uint8_t *in, size_t in_step, int in_length, uint8_t *out, size_t out_step, int length) {
  double scale = (double)in_length / length, wide = scale > 1 ? scale : 1;
  int *weights = need(sizeof(int) * ((size_t)wide * 2 + 3));
  double *shares = need(sizeof(double) * ((size_t)wide * 2 + 3));
  for (int i = 0; i < length; ++i) {
    double centre = (i + 0.5) * scale, total = 0;
    int first = (int)(centre - wide + 0.5), last = (int)(centre + wide + 0.5);
    if (first < 0) first = 0;
    if (last > in_length) last = in_length;
    for (int k = first; k < last; ++k) {
      double share = 1 - fabs((k - centre + 0.5) / wide);
      shares[k - first] = share > 0 ? share : 0;
      total += shares[k - first];
    }
    for (int k = first; k < last; ++k) weights[k - first] = (int)(0.5 + shares[k - first] / total * (1 << 22));
    for (int c = 0; c < 3; ++c) {
      int64_t sum = 1 << 21;
      for (int k = first; k < last; ++k) sum += (int64_t)in[k * in_step + c] * weights[k - first];
      sum >>= 22;
      out[i * out_step + c] = (uint8_t)(sum < 0 ? 0 : sum > 255 ? 255 : sum);
    }
  }
  free(weights);
  free(shares);
}

static void resize(const uint8_t *in, int rows, int columns, size_t step, uint8_t *out, int to_rows, int to_columns,
                   size_t to_step) {
  uint8_t *between = need((size_t)rows * to_columns * 3);
  for (int y = 0; y < rows; ++y) {
    if (columns == to_columns) memcpy(between + (size_t)y * to_columns * 3, in + y * step, (size_t)columns * 3);
    else resize_line(in + y * step, 3, columns, between + (size_t)y * to_columns * 3, 3, to_columns);
  }
  for (int x = 0; x < to_columns; ++x) {
    if (rows == to_rows)
      for (int y = 0; y < rows; ++y) memcpy(out + y * to_step + 3 * x, between + ((size_t)y * to_columns + x) * 3, 3);
    else resize_line(between + 3 * x, (size_t)to_columns * 3, rows, out + 3 * x, to_step, to_rows);
  }
  free(between);
}

/* Fit, resize to RESIZE x RESIZE, centre crop SIZE x SIZE, normalise: the exporter's Preprocess. */
static void preprocess(Image image, float pixels[1][3][SIZE][SIZE]) {
  static uint8_t canvas[RESIZE][RESIZE][3];
  memset(canvas, 0, sizeof canvas);
  int rows = image.rows, columns = image.columns, top = 0, left = 0, to_rows = RESIZE, to_columns = RESIZE;
  const uint8_t *from = image.rgb;
  size_t step = (size_t)columns * 3;
  if (FIT == CROP) {
    int side = rows < columns ? rows : columns;
    from += (rows - side) / 2 * step + (columns - side) / 2 * 3;
    rows = columns = side;
  } else if (FIT == PAD) {
    int64_t longest = rows > columns ? rows : columns;
    to_rows = (int)((2 * (int64_t)rows * RESIZE + longest) / (2 * longest));
    to_columns = (int)((2 * (int64_t)columns * RESIZE + longest) / (2 * longest));
    if (to_rows < 1) to_rows = 1;
    if (to_columns < 1) to_columns = 1;
    top = (RESIZE - to_rows) / 2;
    left = (RESIZE - to_columns) / 2;
  }
  resize(from, rows, columns, step, &canvas[top][left][0], to_rows, to_columns, sizeof canvas[0]);
  const int start = (RESIZE - SIZE) / 2;
  for (int c = 0; c < 3; ++c)
    for (int y = 0; y < SIZE; ++y)
      for (int x = 0; x < SIZE; ++x) pixels[0][c][y][x] = (canvas[start + y][start + x][c] - MEAN[c]) / STD[c];
}

static float pixels[1][3][SIZE][SIZE], logits[1][CLASSES], embedding[1][FEATURES];

static void answer(const char *name, Image image) {
  preprocess(image, pixels);
  free(image.rgb);
  model(pixels, logits, embedding);
#if TASK == ONE_CLASS
  int best = 0;
  double total = 0;
  for (int c = 1; c < CLASSES; ++c) if (logits[0][c] > logits[0][best]) best = c;
  for (int c = 0; c < CLASSES; ++c) total += exp((logits[0][c] - logits[0][best]) / TEMPERATURE);
  printf("%s  %s  %.3f%s\n", name, LABELS[best], 1 / total, 1 / total < THRESHOLD ? "  doubtful" : "");
#elif TASK == SEVERAL_LABELS
  const char *before = "  ";
  printf("%s", name);
  for (int c = 0; c < CLASSES; ++c) {
    double probability = 1 / (1 + exp(-logits[0][c] / TEMPERATURES[c]));
    if (!(probability >= THRESHOLDS[c])) continue; /* nor NaN */
    printf("%s%s %.3f", before, LABELS[c], probability);
    before = ", ";
  }
  printf("%s\n", *before == ' ' ? "  none" : "");
#else
  printf("%s", name);
  for (int c = 0; c < CLASSES; ++c) {
    double value = logits[0][c] * SPREADS[c] + MEANS[c];
    printf("%s%s %.4g [%.4g, %.4g]%s%s", c ? ", " : "  ", LABELS[c], value, value - MARGINS[c], value + MARGINS[c],
           *UNITS[c] ? " " : "", UNITS[c]);
  }
  printf("\n");
#endif
}

static int earlier(const void *a, const void *b) { return (*(double *)a > *(double *)b) - (*(double *)a < *(double *)b); }

static int self_check(const char *folder) {
  char path[9000], file[256];
  size_t size, expected_size;
  int images = 0, classes = 0, side = 0, channels = 0, rows, columns;
  double limit = 0, ignored, worst = 0, off = 0;
  snprintf(path, sizeof path, "%s/index.txt", folder);
  FILE *index = fopen(path, "r");
  if (!index || fscanf(index, "%d %d %d %d %lf", &images, &classes, &side, &channels, &limit) != 5 || classes != CLASSES
      || side != SIZE || images < 1 || images > 1000 || channels != CHANNELS)
    fail(path, "expected the golden vectors of this model, found none. Try --golden BUNDLE/golden/raw");
  snprintf(path, sizeof path, "%s/pixels.f32", folder);
  float *golden = (float *)read_file(path, &size);
  snprintf(path, sizeof path, "%s/logits.f32", folder);
  float *expected = (float *)read_file(path, &expected_size);
  if (size != sizeof pixels * images || expected_size != sizeof logits * images)
    fail(folder, "expected whole golden vectors, found them cut short");
  for (int i = 0; i < images; ++i) {
    memcpy(pixels, golden + i * sizeof pixels / sizeof(float), sizeof pixels);
    model(pixels, logits, embedding);
    for (int c = 0; c < CLASSES; ++c) {
      double apart = fabs((double)logits[0][c] - expected[i * CLASSES + c]) / limit;
      worst = isnan(apart) ? INFINITY : fmax(worst, apart);
    }
    if (fscanf(index, "%255s %d %d %lf", file, &rows, &columns, &ignored) != 4) fail(folder, "index.txt is cut short");
    snprintf(path, sizeof path, "%s/%s", folder, file);
    uint8_t *frame = read_file(path, &size);
    require_frame(path, rows, columns);
    if (size != (size_t)rows * columns * channels) fail(path, "expected a whole frame, found it cut short");
    Image image = from_frame(frame, rows, columns);
    preprocess(image, pixels);
    size_t differing = 0;
    for (int k = 0; k < 3 * SIZE * SIZE; ++k)
      differing += fabsf(((float *)pixels)[k] - golden[i * 3 * SIZE * SIZE + k]) * STD[k / (SIZE * SIZE)] > 1.01f;
    off = fmax(off, (double)differing / (3 * SIZE * SIZE));
    free(image.rgb);
    free(frame);
  }
  double times[28], spent = 0;
  int runs = 0;
  for (int run = -3; run < 25 && spent < 1e4; ++run) {
    struct timespec begun, ended;
    clock_gettime(CLOCK_MONOTONIC, &begun);
    model(pixels, logits, embedding);
    clock_gettime(CLOCK_MONOTONIC, &ended);
    double took = (ended.tv_sec - begun.tv_sec) * 1e3 + (ended.tv_nsec - begun.tv_nsec) / 1e6;
    if (run >= 0 || took > 1e3) times[runs++] = took; /* where a run takes seconds there is nothing to warm up */
    spent += took;
  }
  qsort(times, runs, sizeof times[0], earlier);
  int passed = worst <= 1 && off <= 1e-3;
  printf("logits        %s: %d golden vectors, worst at %.2f of its tolerance\n", worst <= 1 ? "ok" : "FAILED", images, worst);
  printf("pixels        %s: at most %.4f %% of them more than 1 grey level off\n", off <= 1e-3 ? "ok" : "FAILED", 100 * off);
  printf("latency       p50 %.1f ms, p95 %.1f ms (core form, 1 thread)\n", times[runs / 2], times[runs * 19 / 20]);
  FILE *status = fopen("/proc/self/status", "r");
  while (status && fgets(path, sizeof path, status))
    if (!strncmp(path, "VmHWM:", 6)) printf("memory        %.0f MB at most\n", atof(path + 6) / 1e3 * 1.024);
  printf("self-check %s\n", passed ? "passed" : "FAILED");
  return passed ? 0 : 1;
}

int main(int count, char **arguments) {
  char beside[4096], path[8192], golden[8192];
  int rows = 0, columns = 0, check = 0, done = 0;
  snprintf(beside, sizeof beside, "%s", arguments[0]);
  char *slash = strrchr(beside, '/');
  snprintf(slash ? slash : beside, 3, slash ? "/" : "./");
  snprintf(path, sizeof path, "%smodel.bin", beside);
  snprintf(golden, sizeof golden, "%s../../golden/raw", beside);
  if (!model_load(path)) fail(path, "expected the weights beside the program, found none");
  for (int i = 1; i < count; ++i) {
    if (!strcmp(arguments[i], "--self-check")) check = 1;
    else if (!strcmp(arguments[i], "--golden") && i + 1 < count) snprintf(golden, sizeof golden, "%s", arguments[++i]);
    else if (!strcmp(arguments[i], "--raw") && i + 2 < count) { rows = atoi(arguments[++i]); columns = atoi(arguments[++i]); }
    else if (arguments[i][0] == '-') fail(arguments[i], "expected --raw, --golden or --self-check");
    else if (!rows) { answer(arguments[i], read_ppm(arguments[i])); done = 1; }
    else {
      require_frame(arguments[i], rows, columns);
      size_t size, wanted = (size_t)rows * columns * CHANNELS;
      uint8_t *frame = read_file(arguments[i], &size);
      if (size != wanted) fail(arguments[i], "expected another number of bytes. Check rows and columns");
      answer(arguments[i], from_frame(frame, rows, columns));
      free(frame);
      done = 1;
    }
  }
  if (check) return self_check(golden);
  if (!done) fail("classify", "expected images or --self-check, found neither");
  return 0;
}
