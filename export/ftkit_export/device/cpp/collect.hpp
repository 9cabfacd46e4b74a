// Collect on the device what is worth labelling, and a log for `ftkit drift`; never in the way.
//
//   Collector collector(folder, options);
//   collector.offer(sighting, frame);      // after each answer; never throws
//
//   folder/doubtful/  foreign/  control/   pictures, by why they were kept
//   folder/log.jsonl, log.1.jsonl, ...     a line an image, never its pixels or its name
//   folder/state.json                      how many of each kind were seen
//
// The same folder, bounds and log as runtime/collect.py has, but for the drift test, which `ftkit drift` makes from
// the log. Whatever fails here, such as a full disk, ends the collecting, with one line on standard error, and never
// the classifying.
#pragma once

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace fs = std::filesystem;

// What the model made of an image; see runtime/collect.py: Sighting.
struct Sighting {
  std::string label;
  double probability = 0;
  bool doubtful = false, foreign = false;
  double score = 0;
  std::vector<double> coordinates;
  std::array<double, 5> frame{};
};

// The out-of-distribution statistics in the model's metadata; see runtime/out_of_distribution.py.
class Familiar {
 public:
  explicit Familiar(const std::string& text) {
    if (text.empty()) return;
    means_ = halves(text, "means", classes_, width_);
    size_t width = 0;
    directions_ = halves(text, "directions", axes_, width);
    weights_ = floats(text, "weights");
    spreads_ = text.find("\"spreads\"") == std::string::npos ? std::vector<double>(classes_, 1.0) : floats(text, "spreads");
    rest_ = number(text, "rest");
    threshold_ = number(text, "threshold");
    if (!classes_ || !width_ || width != width_ || weights_.size() != axes_ || spreads_.size() != classes_ || !(rest_ > 0))
      throw std::runtime_error("out-of-distribution statistics: expected shapes that match, found others. Copy the bundle again");
  }

  bool known() const { return classes_ > 0; }
  double threshold() const { return threshold_; }

  // Squared distance of an embedding, scaled to length 1, to the nearest class mean, divided by its width; and its
  // coordinates along the directions.
  double score(const float* embedding, size_t width, std::vector<double>& along) const {
    if (width != width_) throw std::runtime_error("embedding: expected " + std::to_string(width_) + " values, found " + std::to_string(width));
    double length = 0;
    for (size_t i = 0; i < width; ++i) length += double(embedding[i]) * embedding[i];
    length = std::max(std::sqrt(length), 1e-12);
    std::vector<double> apart(width);
    double nearest = INFINITY;
    for (size_t c = 0; c < classes_; ++c) {
      double square = 0;
      for (size_t i = 0; i < width; ++i) {
        apart[i] = embedding[i] / length - means_[c * width + i];
        square += apart[i] * apart[i];
      }
      square /= rest_;
      for (size_t a = 0; a < axes_; ++a) {
        const double part = dot(&directions_[a * width], apart.data(), width);
        square -= weights_[a] * part * part;
      }
      nearest = std::min(nearest, square / spreads_[c]);
    }
    along.assign(axes_, 0.0);
    for (size_t a = 0; a < axes_; ++a)
      for (size_t i = 0; i < width; ++i) along[a] += directions_[a * width + i] * (embedding[i] / length);
    return nearest / width;
  }

 private:
  static double dot(const double* one, const double* other, size_t count) {
    double sum = 0;
    for (size_t i = 0; i < count; ++i) sum += one[i] * other[i];
    return sum;
  }

  // The JSON is ftkit's own: "NAME": {"shape": [A, B], "dtype": ..., "base64": "..."}
  static size_t after(const std::string& text, const std::string& key, size_t from) {
    const size_t at = text.find('"' + key + "\":", from);
    if (at == std::string::npos) throw std::runtime_error("out-of-distribution statistics: expected " + key + ", found none");
    return at + key.size() + 3;
  }
  static double number(const std::string& text, const std::string& key) { return std::strtod(text.c_str() + after(text, key, 0), nullptr); }

  static std::vector<uint8_t> packed(const std::string& text, const std::string& name, size_t& rows, size_t& columns) {
    const size_t at = after(text, name, 0);
    const char* shape = text.c_str() + text.find('[', after(text, "shape", at)) + 1;
    char* end = nullptr;
    rows = std::strtoull(shape, &end, 10);
    columns = *end == ',' ? std::strtoull(end + 1, nullptr, 10) : 1;
    const size_t from = text.find('"', after(text, "base64", at)) + 1;
    std::vector<uint8_t> bytes;
    uint32_t bits = 0;
    int held = 0;
    for (size_t i = from; i < text.size() && text[i] != '"'; ++i) {
      static const std::string letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
      const size_t value = letters.find(text[i]);
      if (value == std::string::npos) continue;
      bits = bits << 6 | uint32_t(value);
      held += 6;
      if (held >= 8) bytes.push_back(uint8_t(bits >> (held -= 8)));
    }
    return bytes;
  }
  static std::vector<double> halves(const std::string& text, const std::string& name, size_t& rows, size_t& columns) {
    const auto bytes = packed(text, name, rows, columns);
    std::vector<double> values;
    for (size_t i = 0; i + 1 < bytes.size(); i += 2) {
      const int half = bytes[i] | bytes[i + 1] << 8;
      const int exponent = half >> 10 & 31, fraction = half & 1023;
      const double value = exponent == 0    ? std::ldexp(fraction, -24)
                           : exponent == 31 ? (fraction ? NAN : INFINITY)
                                            : std::ldexp(1024 + fraction, exponent - 25);
      values.push_back(half >> 15 ? -value : value);
    }
    if (rows > kMost || columns > kMost || values.size() != rows * columns) throw std::runtime_error("out-of-distribution statistics: expected all values, found some");
    return values;
  }
  static std::vector<double> floats(const std::string& text, const std::string& name) {
    size_t rows = 0, columns = 0;
    const auto bytes = packed(text, name, rows, columns);
    std::vector<double> values;
    for (size_t i = 0; i + 3 < bytes.size(); i += 4) {
      float value;
      std::memcpy(&value, &bytes[i], 4);
      values.push_back(value);
    }
    return values;
  }

  static constexpr size_t kMost = 1 << 24;  // of either side of an array
  size_t classes_ = 0, width_ = 0, axes_ = 0;
  std::vector<double> means_, directions_, weights_, spreads_;
  double rest_ = 1, threshold_ = 0;
};

// Brightness, contrast, sharpness, red and blue relative to green: drift.frame_statistics.
inline std::array<double, 5> frame_statistics(const uint8_t* bytes, int64_t rows, int64_t columns, int64_t channels, const std::string& format) {
  constexpr int64_t kSampled = 48;
  if (format == "nv12") rows = rows * 2 / 3;
  const int64_t down = std::max<int64_t>(1, rows / kSampled), across = std::max<int64_t>(1, columns / kSampled);
  double sum = 0, squares = 0, difference = 0;
  std::vector<double> sums(channels, 0.0);
  int64_t count = 0, neighbours = 0;
  for (int64_t row = 0; row < rows; row += down) {
    for (int64_t column = 0; column < columns - 1; column += across) {
      const uint8_t* at = bytes + (row * columns + column) * channels;
      for (int64_t c = 0; c < channels; ++c) {
        sum += at[c];
        squares += double(at[c]) * at[c];
        sums[c] += at[c];
        difference += std::abs(int(at[c + channels]) - int(at[c]));
      }
      count += channels;
      neighbours += channels;
    }
  }
  if (!count) {  // one pixel wide
    for (int64_t row = 0; row < rows; row += down)
      for (int64_t i = 0; i < columns * channels; ++i, ++count) sum += bytes[row * columns * channels + i];
    return {count ? sum / count : 0, 0, 0, 0, 0};
  }
  const double mean = sum / count, contrast = std::sqrt(std::max(0.0, squares / count - mean * mean));
  double red = 0, blue = 0;
  if (channels == 3) {
    const double pixels = double(count) / 3;
    red = (sums[0] - sums[1]) / pixels;
    blue = (sums[2] - sums[1]) / pixels;
    if (format == "bgr") std::swap(red, blue);
  }
  return {mean, contrast, difference / neighbours / (contrast + 1), red, blue};
}

// A frame in the model's input format as the content of a PPM or PGM file, as the device sees it.
inline std::string as_picture(const uint8_t* bytes, int64_t rows, int64_t columns, int64_t channels, const std::string& format) {
  if (format == "nv12") rows = rows * 2 / 3;
  const std::string size = std::to_string(columns) + " " + std::to_string(rows) + "\n255\n";
  if (format == "grey") return "P5\n" + size + std::string(reinterpret_cast<const char*>(bytes), size_t(rows * columns));
  std::string pixels(size_t(rows * columns * 3), '\0');
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      char* to = &pixels[(row * columns + column) * 3];
      if (format == "nv12") {  // BT.601, as preprocess.from_frame
        const uint8_t* pair = bytes + (rows + row / 2) * columns + column / 2 * 2;
        const double luma = (bytes[row * columns + column] - 16) * (255.0 / 219), u = pair[0] - 128, v = pair[1] - 128;
        const double rgb[] = {luma + 1.596027 * v, luma - 0.391762 * u - 0.812968 * v, luma + 2.017232 * u};
        for (int c = 0; c < 3; ++c) to[c] = char(uint8_t(std::clamp(std::nearbyint(rgb[c]), 0.0, 255.0)));
      } else {
        const uint8_t* from = bytes + (row * columns + column) * channels;
        for (int c = 0; c < 3; ++c) to[c] = char(from[format == "bgr" ? 2 - c : c]);
      }
    }
  }
  return "P6\n" + size + pixels;
}

struct CollectOptions {
  double control = 0.01;     // share of all images that is kept
  size_t most = 2000;        // pictures at most
  uint64_t bytes = 500000000;
};

class Collector {
 public:
  Collector(fs::path folder, CollectOptions options, std::string reference)
      : folder_(std::move(folder)), options_(options), reference_(std::move(reference)), random_(std::random_device{}()) {
    try {
      for (const auto& reason : kReasons) fs::create_directories(folder_ / reason);
    } catch (const fs::filesystem_error& error) {
      if (is_full(error.code().value())) {  // the classifier must start all the same
        stop(error.code().message().c_str());
        return;
      }
      throw std::runtime_error(folder_.string() + ": expected a folder to collect in, found: " + error.code().message() + ". Try another --keep");
    }
    lock_ = ::open((folder_ / ".lock").c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0644);
    if (lock_ < 0 && is_full(errno)) {
      stop(std::strerror(errno));
      return;
    }
    if (lock_ < 0 || ::flock(lock_, LOCK_EX | LOCK_NB) != 0)
      throw std::runtime_error(folder_.string() + ": expected a folder that no other process collects in, found one in use. Try another --keep");
    for (const auto& reason : kReasons)
      for (const auto& entry : fs::directory_iterator(folder_ / reason))
        found(reason, entry.path());
    read_seen();
    for (auto& reason : kReasons) seen_[reason] = std::max<uint64_t>(seen_[reason], kept_[reason].size());
    end_torn_line();
  }
  Collector(const Collector&) = delete;
  Collector& operator=(const Collector&) = delete;
  ~Collector() {
    try {
      if (!stopped_) save();
    } catch (...) {  // the next start counts what is there
    }
    if (lock_ >= 0) ::close(lock_);
  }

  // picture: makes the content of a file, and its suffix; called only where the picture is kept.
  void offer(const Sighting& sighting, const std::function<std::pair<std::string, std::string>()>& picture) noexcept {
    if (stopped_) return;
    try {
      // A control is drawn from all, so that it stands for all
      const std::string reason = chance() < options_.control ? "control" : sighting.foreign ? "foreign" : sighting.doubtful ? "doubtful" : "";
      const std::string name = reason.empty() ? "" : keep(reason, picture);
      write_line(sighting, name.empty() ? "" : reason + "/" + name);
      if (!name.empty() || ++unsaved_ >= 100) save();
    } catch (const std::exception& error) {
      stop(error.what());
    } catch (...) {
      stop("an unknown error");
    }
  }

 private:
  static constexpr uint64_t kSpare = 100000000, kLogBytes = 8000000;  // left free on the disk; of one log file
  static constexpr int kLogs = 4;
  const std::array<std::string, 3> kReasons{"foreign", "doubtful", "control"};

  static bool is_full(int error) { return error == ENOSPC || error == EDQUOT; }

  // A file in the folder of a reason: a picture, or what a process left half written when it was killed.
  void found(const std::string& reason, const fs::path& path) {
    const std::string name = path.filename().string();
    if (name[0] == '.') {
      fs::remove(path);
      return;
    }
    kept_[reason][name] = fs::file_size(path);
    const std::string stem = path.stem().string();
    if (!stem.empty() && stem.size() < 19 && stem.find_first_not_of("0123456789") == std::string::npos)
      last_ = std::max<uint64_t>(last_, std::stoull(stem));  // the clock may have been set back since
  }

  double chance() { return std::uniform_real_distribution<double>(0, 1)(random_); }
  std::string any(const std::map<std::string, uint64_t>& names) {
    auto at = names.begin();
    std::advance(at, std::uniform_int_distribution<size_t>(0, names.size() - 1)(random_));
    return at->first;
  }
  void remove(const std::string& reason, const std::string& name) {
    std::error_code ignored;
    fs::remove(folder_ / reason / name, ignored);
    kept_[reason].erase(name);
  }
  uint64_t used(const std::string& reason) {
    uint64_t sum = 0;
    for (const auto& [name, size] : kept_[reason]) sum += size;
    return sum;
  }
  uint64_t used() { return used("foreign") + used("doubtful") + used("control"); }

  // Reservoir sampling (Vitter 1985): within a reason every picture has the same chance to stay.
  std::string keep(const std::string& reason, const std::function<std::pair<std::string, std::string>()>& picture) {
    const uint64_t seen = ++seen_[reason];
    const size_t room = std::max<size_t>(1, options_.most / kReasons.size());
    if (kept_[reason].size() >= room && chance() >= double(room) / double(seen)) return "";
    const auto [content, suffix] = picture();
    const std::string replaced = kept_[reason].size() >= room ? any(kept_[reason]) : "";
    if (!takes(reason, content.size(), replaced.empty() ? 0 : kept_[reason][replaced])) return "";
    if (fs::space(folder_).available < kSpare + content.size()) {
      stop("less than 100 MB of disk are left");
      return "";
    }
    if (!replaced.empty()) remove(reason, replaced);
    make_room(content.size());
    const uint64_t now = std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::system_clock::now().time_since_epoch()).count();
    last_ = std::max(last_ + 1, now);
    const std::string name = std::to_string(last_) + suffix;
    replace(folder_ / reason / name, content);
    kept_[reason][name] = content.size();
    return name;
  }

  // The reason that has the most bytes, but for controls, which go first.
  std::string largest() { return used("foreign") > used("doubtful") ? "foreign" : "doubtful"; }

  // Whether a picture of so many bytes is taken. freed: by the picture of its reason that it replaces.
  bool takes(const std::string& reason, uint64_t size, uint64_t freed) {
    const uint64_t others = used("foreign") + used("doubtful") + size - (reason == "control" ? 0 : freed);
    if (size > options_.bytes || (reason == "control" && others > options_.bytes)) return false;
    if (reason == "control" || others <= options_.bytes || used(reason) < used(largest())) return true;
    return chance() < double(kept_[reason].size()) / double(seen_[reason]);
  }

  // The oldest control pictures make room first; then one of the reason that has the most bytes.
  void make_room(uint64_t size) {
    while (used() + size > options_.bytes && !kept_["control"].empty()) remove("control", kept_["control"].begin()->first);
    while (used() + size > options_.bytes) {
      const std::string from = largest();
      remove(from, any(kept_[from]));
    }
  }

  // Beside its place, fsynced, then renamed: a reader sees the old file or the new one.
  static void replace(const fs::path& path, const std::string& content) {
    const fs::path beside = path.parent_path() / ("." + path.filename().string() + ".tmp");
    const int file = ::open(beside.c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0644);
    bool written = file >= 0;
    for (size_t at = 0; written && at < content.size();) {
      const ssize_t part = ::write(file, content.data() + at, content.size() - at);
      written = part > 0;
      at += written ? size_t(part) : 0;
    }
    written = written && ::fsync(file) == 0;
    const int why = errno;
    if (file >= 0) ::close(file);
    if (!written) {
      std::error_code ignored;
      fs::remove(beside, ignored);
      throw std::runtime_error(path.string() + ": " + std::strerror(why));
    }
    fs::rename(beside, path);
  }

  void write_line(const Sighting& sighting, const std::string& kept) {
    const double now = std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
    std::string line = "{\"time\": " + text("%.3f", now) + ", \"bundle\": \"" + reference_ + "\", \"label\": " + quoted(sighting.label) +
                       ", \"probability\": " + text("%.9g", sighting.probability) + ", \"score\": " + text("%.6f", sighting.score) +
                       ", \"coordinates\": " + list("%.7f", sighting.coordinates.data(), sighting.coordinates.size()) +
                       ", \"frame\": " + list("%.6f", sighting.frame.data(), sighting.frame.size()) +
                       ", \"kept\": " + (kept.empty() ? "null" : quoted(kept)) + "}\n";
    const fs::path log = folder_ / "log.jsonl";
    const int file = ::open(log.c_str(), O_CREAT | O_APPEND | O_WRONLY | O_CLOEXEC, 0644);
    if (file >= 0) errno = ENOSPC;  // what a write that is cut short means
    const bool whole = file >= 0 && ::write(file, line.data(), line.size()) == ssize_t(line.size());
    const int why = errno;
    if (file >= 0) ::close(file);
    if (!whole) throw std::runtime_error(log.string() + ": " + std::strerror(why));
    if (fs::file_size(log) <= kLogBytes) return;
    for (int number = kLogs - 1; number > 0; --number) {
      const fs::path newer = number > 1 ? folder_ / ("log." + std::to_string(number - 1) + ".jsonl") : log;
      if (fs::exists(newer)) fs::rename(newer, folder_ / ("log." + std::to_string(number) + ".jsonl"));
    }
  }

  // A power cut may have left the last line without its end.
  void end_torn_line() {
    const fs::path log = folder_ / "log.jsonl";
    std::ifstream file(log, std::ios::binary | std::ios::ate);
    if (!file || file.tellg() == 0) return;
    file.seekg(-1, std::ios::end);
    if (file.get() != '\n') std::ofstream(log, std::ios::app | std::ios::binary) << '\n';
  }

  void save() {
    std::string text = "{\"seen\": {";
    for (const auto& reason : kReasons) text += (reason == kReasons[0] ? "\"" : ", \"") + reason + "\": " + std::to_string(seen_[reason]);
    replace(folder_ / "state.json", text + "}}\n");
    unsaved_ = 0;
  }
  void read_seen() {
    std::ifstream file(folder_ / "state.json");
    const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    for (const auto& reason : kReasons) {
      const size_t at = text.find('"' + reason + "\": ");
      seen_[reason] = at == std::string::npos ? 0 : std::strtoull(text.c_str() + at + reason.size() + 4, nullptr, 10);
    }
  }

  void stop(const char* why) noexcept {
    stopped_ = true;
    std::fprintf(stderr, "%s: collecting stops, classifying goes on: %s\n", folder_.c_str(), why);
  }

  static std::string text(const char* format, double value) {
    char made[64];
    std::snprintf(made, sizeof made, format, std::isfinite(value) ? value : 0.0);
    std::replace(made, made + std::strlen(made), ',', '.');  // a host program may have set another locale
    return made;
  }
  static std::string list(const char* format, const double* values, size_t count) {
    std::string made = "[";
    for (size_t i = 0; i < count; ++i) made += (i ? ", " : "") + text(format, values[i]);
    return made + "]";
  }
  static std::string quoted(const std::string& plain) {
    std::string made = "\"";
    for (const char letter : plain) {
      if (static_cast<unsigned char>(letter) < 32) {
        char code[8];
        std::snprintf(code, sizeof code, "\\u%04x", letter);
        made += code;
        continue;
      }
      if (letter == '"' || letter == '\\') made += '\\';
      made += letter;
    }
    return made + '"';
  }

  fs::path folder_;
  CollectOptions options_;
  std::string reference_;
  std::mt19937_64 random_;
  std::map<std::string, std::map<std::string, uint64_t>> kept_;
  std::map<std::string, uint64_t> seen_;
  int lock_ = -1, unsaved_ = 0;
  uint64_t last_ = 0;
  bool stopped_ = false;
};
