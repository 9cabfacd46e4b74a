// Classify images with model.onnx, or prove that it works here. ONNX Runtime and C++17, nothing else.
//
//   classify IMAGE.ppm...                 what the model says of each image (binary PPM, any size)
//   classify --raw ROWS COLUMNS FILE...   the same of raw frames, in the format the model was exported for
//   classify ... --keep DIR               also collect pictures worth labelling, and a log for `ftkit drift`
//   classify --self-check                 replay the golden frames, time the model; exit 0 or 1
//
// --control SHARE, --keep-most N, --keep-mb N: bounds of --keep (0.01, 2000, 500). --bundle DIR: where model.onnx is (default: two folders above this source). Exit codes: 0 done, 1 a check failed,
// 2 bad input. The model holds all preprocessing: a frame goes in as bytes.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "collect.hpp"
#include "readout.hpp"

namespace fs = std::filesystem;

struct Frame {
  int64_t rows = 0, columns = 0, channels = 0;
  std::vector<uint8_t> bytes;
};

static std::vector<uint8_t> read_bytes(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path.string() + ": expected a readable file, found none. Check the path");
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

static Frame read_raw(const fs::path& path, int64_t rows, int64_t columns, int64_t channels) {
  if (rows < 1 || columns < 1 || rows > 65535 || columns > 65535)
    throw std::runtime_error(path.string() + ": expected 1 to 65535 rows and columns, found others. Check them");
  Frame frame{rows, columns, channels, read_bytes(path)};
  if (frame.bytes.size() != size_t(rows * columns * channels))
    throw std::runtime_error(path.string() + ": expected " + std::to_string(rows * columns * channels) +
                             " bytes, found " + std::to_string(frame.bytes.size()) + ". Check rows and columns");
  return frame;
}

// Binary PPM (P6, 8 bits a channel), comments allowed.
static Frame read_ppm(const fs::path& path) {
  const auto data = read_bytes(path);
  size_t at = 2;
  auto number = [&]() -> int64_t {
    while (at < data.size() && (std::isspace(data[at]) || data[at] == '#'))
      if (data[at++] == '#')
        while (at < data.size() && data[at] != '\n') ++at;
    int64_t value = 0;
    for (; at < data.size() && std::isdigit(data[at]) && value < (1 << 20); ++at) value = value * 10 + data[at] - '0';
    return value;
  };
  const bool ppm = data.size() > 2 && data[0] == 'P' && data[1] == '6';
  const int64_t columns = ppm ? number() : 0, rows = ppm ? number() : 0, deepest = ppm ? number() : 0;
  ++at;
  if (rows < 1 || columns < 1 || rows > 65535 || columns > 65535 || deepest != 255 || data.size() < at || data.size() - at < size_t(rows * columns * 3))
    throw std::runtime_error(path.string() + ": expected a whole binary PPM of 8 bits, found none. Convert it first");
  return {rows, columns, 3, {data.begin() + at, data.begin() + at + rows * columns * 3}};
}

class Model {
 public:
  explicit Model(const fs::path& bundle)
      : session_(environment_, (bundle / "model.onnx").c_str(), options()), channels(image_channels()), readout(metadata("readout", "")) {
    std::ifstream names(bundle / "labels.txt");
    for (std::string line; std::getline(names, line);) labels.push_back(line);
    readout.require(labels.size());
    threshold = std::stod(metadata("abstain_threshold", "0"));
    format = metadata("input_format", "rgb");
    familiar = Familiar(metadata("out_of_domain", ""));
  }

  // embedding: filled where it is asked for.
  std::vector<float> run(Frame& frame, std::vector<float>* embedding = nullptr) {
    const int64_t shape[] = {1, frame.rows, frame.columns, frame.channels};
    auto input = Ort::Value::CreateTensor<uint8_t>(memory_, frame.bytes.data(), frame.bytes.size(), shape, 4);
    const char *in[] = {"image"}, *out[] = {readout.output(), "embedding"};
    auto found = session_.Run(Ort::RunOptions{nullptr}, in, &input, 1, out, embedding ? 2 : 1);
    auto values = [&](size_t output) {
      const float* first = found[output].GetTensorData<float>();
      return std::vector<float>(first, first + found[output].GetTensorTypeAndShapeInfo().GetElementCount());
    };
    if (embedding) *embedding = values(1);
    return values(0);
  }

 private:
  static Ort::SessionOptions options() {
    Ort::SessionOptions made;
    made.SetIntraOpNumThreads(1);
    return made;
  }
  int64_t image_channels() { return session_.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape().at(3); }
  std::string metadata(const char* key, const char* otherwise) {
    Ort::AllocatorWithDefaultOptions allocator;
    auto found = session_.GetModelMetadata().LookupCustomMetadataMapAllocated(key, allocator);
    return found ? found.get() : otherwise;
  }

  Ort::Env environment_{ORT_LOGGING_LEVEL_ERROR, "classify"};
  Ort::Session session_;
  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);

 public:
  int64_t channels;
  Readout readout;
  std::vector<std::string> labels;
  double threshold = 0;
  std::string format;
  Familiar familiar{""};
};

static void print_answer(const std::string& name, Model& model, Frame frame, Collector* collector) {
  std::vector<float> embedding;
  const auto found = model.run(frame, &embedding);
  Sighting sighting;
  if (model.familiar.known()) {
    sighting.score = model.familiar.score(embedding.data(), embedding.size(), sighting.coordinates);
    sighting.foreign = sighting.score > model.familiar.threshold();
  }
  if (model.readout.task != Readout::kClass) {
    std::printf("%s  %s%s\n", name.c_str(), model.readout.text(model.labels, found).c_str(), sighting.foreign ? "  foreign" : "");
    return;
  }
  const size_t best = std::max_element(found.begin(), found.end()) - found.begin();
  sighting.label = model.labels.at(best);
  sighting.probability = found[best];
  sighting.doubtful = found[best] < model.threshold;
  std::printf("%s  %s  %.3f%s\n", name.c_str(), sighting.label.c_str(), found[best],
              sighting.foreign ? "  foreign" : sighting.doubtful ? "  doubtful" : "");
  if (!collector) return;
  sighting.frame = frame_statistics(frame.bytes.data(), frame.rows, frame.columns, frame.channels, model.format);
  collector->offer(sighting, [&] {
    const std::string suffix = model.format == "grey" ? ".pgm" : ".ppm";
    return std::make_pair(as_picture(frame.bytes.data(), frame.rows, frame.columns, frame.channels, model.format), suffix);
  });
}

// The name of the drift test's reference in a log: the first digits of its hash, which the manifest holds.
static std::string reference_name(const fs::path& bundle) {
  std::ifstream file(bundle / "manifest.json");
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const std::string key = "\"drift.json\": \"";
  const size_t at = text.find(key);
  return at == std::string::npos ? "" : text.substr(at + key.size(), 12);
}

static int self_check(Model& model, const fs::path& bundle) {
  const fs::path folder = bundle / "golden" / "raw";
  std::ifstream index(folder / "index.txt");
  size_t images = 0, classes = 0;
  int64_t size = 0, channels = 0;
  double ignored = 0;
  if (!(index >> images >> classes >> size >> channels >> ignored) || images < 1 || images > 1000 || classes < 1 ||
      classes > 1000000)
    throw std::runtime_error((folder / "index.txt").string() + ": expected golden frames, found none");
  const auto bytes = read_bytes(folder / "probabilities.f32");
  if (bytes.size() != images * classes * sizeof(float)) throw std::runtime_error("golden frames are incomplete");
  const float* expected = reinterpret_cast<const float*>(bytes.data());
  double worst = 0;
  Frame first;
  for (size_t i = 0; i < images; ++i) {
    std::string file;
    int64_t rows = 0, columns = 0;
    double limit = 0;
    if (!(index >> file >> rows >> columns >> limit)) throw std::runtime_error("golden frames are incomplete");
    Frame frame = read_raw(folder / file, rows, columns, channels);
    const auto found = model.run(frame);
    for (size_t c = 0; c < classes; ++c) {
      const double apart = std::fabs(double(found.at(c)) - expected[i * classes + c]) / model.readout.unit(c) / limit;
      worst = std::isnan(apart) ? INFINITY : std::max(worst, apart);
    }
    if (i == 0) first = frame;
  }
  std::vector<double> times;
  for (int run = 0; run < 70; ++run) {
    const auto begun = std::chrono::steady_clock::now();
    model.run(first);
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begun;
    if (run >= 20) times.push_back(took.count());
  }
  std::sort(times.begin(), times.end());
  const bool passed = worst <= 1;
  std::printf("%-13s %s: %zu golden frames, worst at %.2f of its tolerance\n", model.readout.output(), passed ? "ok" : "FAILED", images, worst);
  std::printf("latency       p50 %.1f ms, p95 %.1f ms (1 thread)\n", times[25], times[47]);
  std::printf("self-check %s\n", passed ? "passed" : "FAILED");
  return passed ? 0 : 1;
}

int main(int count, char** arguments) {
  fs::path bundle = fs::path(__FILE__).parent_path().parent_path().parent_path();
  std::vector<std::string> files;
  bool check = false, raw = false;
  int64_t rows = 0, columns = 0;
  fs::path keep;
  CollectOptions options;
  double megabytes = 500;
  try {
    for (int i = 1; i < count; ++i) {
      const std::string word = arguments[i];
      if (word == "--bundle" && i + 1 < count) bundle = arguments[++i];
      else if (word == "--self-check") check = true;
      else if (word == "--keep" && i + 1 < count) keep = arguments[++i];
      else if (word == "--control" && i + 1 < count) options.control = std::stod(arguments[++i]);
      else if (word == "--keep-most" && i + 1 < count) options.most = std::stoull(arguments[++i]);
      else if (word == "--keep-mb" && i + 1 < count) megabytes = std::stod(arguments[++i]);
      else if (word == "--raw" && i + 2 < count) { raw = true; rows = std::stoll(arguments[++i]); columns = std::stoll(arguments[++i]); }
      else if (word.rfind("--", 0) == 0) throw std::runtime_error(word + ": expected --bundle, --raw, --keep or --self-check");
      else files.push_back(word);
    }
    if (!(options.control >= 0 && options.control <= 1) || options.most < 3 || !(megabytes > 0))
      throw std::runtime_error("expected a control share of 0 to 1, 3 pictures or more, and some space, found others. Check the options");
    options.bytes = uint64_t(1e6 * std::min(megabytes, 1e9));
    if (files.empty() && !check) throw std::runtime_error("expected images or --self-check, found neither");
    Model model(bundle);
    if (check) return self_check(model, bundle);
    if (!keep.empty() && model.readout.task != Readout::kClass)
      throw std::runtime_error("--keep: expected a single-label bundle, found another one. Leave it out");
    if (!raw && model.format != "rgb")
      throw std::runtime_error("expected raw " + model.format + " frames, found images. Try --raw ROWS COLUMNS FILE");
    std::unique_ptr<Collector> collector;
    if (!keep.empty()) collector = std::make_unique<Collector>(keep, options, reference_name(bundle));
    for (const auto& file : files)
      print_answer(file, model, raw ? read_raw(file, rows, columns, model.channels) : read_ppm(file), collector.get());
  } catch (const std::logic_error&) {  // from std::stod and the like
    std::fprintf(stderr, "error: expected numbers after an option, found something else. Check the options\n");
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
  return 0;
}
