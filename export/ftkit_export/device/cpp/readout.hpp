// How the model's answers are read: one class, several labels, or numbers in their units.
//
//   Readout readout(metadata);             // the metadata "readout"; "" for one class
//   readout.text(names, answers);          // the line that classify.py prints
//
// The JSON is ftkit's own; see runtime/readout.py.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

class Readout {
 public:
  enum Task { kClass, kLabels, kValues };

  explicit Readout(const std::string& json) {
    if (json.empty()) return;
    const auto tasks = strings(json, "task");
    const std::string named = tasks.empty() ? "" : tasks[0];
    if (named == "multi-label") {
      task = kLabels;
      thresholds_ = numbers(json, "thresholds");
    } else if (named == "regression") {
      task = kValues;
      spreads_ = numbers(json, "spreads");
      margins_ = numbers(json, "margins");
      units_ = strings(json, "units");
    } else {
      throw damaged();
    }
  }

  Task task = kClass;

  // Raises std::runtime_error where the metadata is of another number of answers.
  void require(size_t answers) const {
    const bool fits = task == kClass || (task == kLabels && thresholds_.size() == answers) ||
                      (task == kValues && spreads_.size() == answers && margins_.size() == answers && units_.size() == answers);
    if (!fits) throw damaged();
  }

  const char* output() const { return task == kValues ? "values" : "probabilities"; }
  // What differences of an answer are measured in.
  double unit(size_t answer) const { return task == kValues ? spreads_.at(answer) : 1.0; }

  // Of labels and values; a class is named by its caller.
  std::string text(const std::vector<std::string>& names, const std::vector<float>& answers) const {
    std::string line;
    for (size_t i = 0; i < answers.size(); ++i) {
      const double value = answers[i];
      char part[160];
      if (task == kLabels) {
        if (!(value >= thresholds_.at(i))) continue;
        std::snprintf(part, sizeof part, " %.3f", value);
      } else {
        std::snprintf(part, sizeof part, " %.4g [%.4g, %.4g]", value, value - margins_.at(i), value + margins_.at(i));
      }
      line += (line.empty() ? "" : ", ") + names.at(i) + part;
      if (task == kValues && !units_.at(i).empty()) line += " " + units_.at(i);
    }
    return line.empty() ? "none" : line;
  }

 private:
  static std::runtime_error damaged() {
    return std::runtime_error("readout in the model's metadata: expected what ftkit writes, found it damaged. Copy the bundle again");
  }
  static size_t after(const std::string& json, const std::string& key) {
    const size_t at = json.find('"' + key + "\": ");
    if (at == std::string::npos) throw damaged();
    return at + key.size() + 4;
  }
  static std::vector<double> numbers(const std::string& json, const std::string& key) {
    const char* at = json.c_str() + after(json, key);
    std::vector<double> found;
    if (*at != '[') throw damaged();
    for (char* end = nullptr; *at && *at != ']'; at = end) {
      found.push_back(std::strtod(at + 1, &end));
      if (end == at + 1 || (*end != ',' && *end != ']')) throw damaged();
    }
    return found;
  }
  // One string, or a list of them.
  static std::vector<std::string> strings(const std::string& json, const std::string& key) {
    size_t at = after(json, key);
    const bool list = at < json.size() && json[at] == '[';
    std::vector<std::string> found;
    while (at < json.size() && json[at] != ']') {
      if (json[at] != '"') {
        ++at;
        continue;
      }
      std::string text;
      for (++at; at < json.size() && json[at] != '"'; ++at) {
        if (json[at] == '\\') ++at;  // before a quotation mark or a backslash; names are of one line
        if (at < json.size()) text += json[at];
      }
      ++at;
      found.push_back(text);
      if (!list) break;
    }
    return found;
  }

  std::vector<double> thresholds_, spreads_, margins_;
  std::vector<std::string> units_;
};
