#include "problem.h"

#include <stdexcept>

namespace convkit {

const char* name(DType t) {
  switch (t) {
    case DType::f64: return "f64";
    case DType::f32: return "f32";
    case DType::bf16: return "bf16";
    case DType::f16: return "f16";
  }
  return "?";
}

const char* name(Layout l) { return l == Layout::nchw ? "nchw" : "nhwc"; }

const char* name(Pass p) {
  switch (p) {
    case Pass::forward: return "fprop";
    case Pass::input_grad: return "dgrad";
    case Pass::weight_grad: return "wgrad";
  }
  return "?";
}

namespace {

std::string pair(char letter, int64_t a, int64_t b) {
  std::string out = letter + std::to_string(a);
  return a == b ? out : out + "x" + std::to_string(b);
}

int64_t out_size(int64_t in, int64_t pads, int64_t dilation, int64_t taps, int64_t stride) {
  return (in + pads - dilation * (taps - 1) - 1) / stride + 1;
}

// Reads `n32c64…` a letter and up to four numbers at a time.
class Scanner {
 public:
  explicit Scanner(const std::string& text) : text_(text) {}

  int numbers(char letter, int64_t out[4], int at_most) {
    if (at_ >= text_.size() || text_[at_] != letter) fail(std::string("expected '") + letter + "' and a number");
    ++at_;
    int count = 0;
    do {
      if (count > 0) ++at_;  // the 'x' between two numbers
      if (count == at_most) fail(std::string("too many numbers after '") + letter + "'");
      size_t start = at_;
      int64_t value = 0;
      while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') {
        value = value * 10 + (text_[at_++] - '0');
        if (value > INT32_MAX) fail(std::string("the number after '") + letter + "' is above 2147483647");
      }
      if (start == at_) fail(std::string("expected a number after '") + letter + "'");
      out[count++] = value;
    } while (at_ < text_.size() && text_[at_] == 'x');
    return count;
  }

  int64_t number(char letter) {
    int64_t v[4];
    numbers(letter, v, 1);
    return v[0];
  }

  void two(char letter, int64_t& a, int64_t& b) {
    int64_t v[4];
    int n = numbers(letter, v, 2);
    a = v[0];
    b = v[n - 1];
  }

  std::string word() {
    if (at_ >= text_.size() || text_[at_] != '_') fail("expected '_' and a dtype or layout");
    size_t end = text_.find('_', ++at_);
    std::string out = text_.substr(at_, end == std::string::npos ? end : end - at_);
    at_ = end == std::string::npos ? text_.size() : end;
    return out;
  }

  [[noreturn]] void fail(const std::string& why) const {
    throw std::invalid_argument("problem '" + text_ + "': " + why + " at character " + std::to_string(at_ + 1) +
                                "; a problem reads like n32c64h56w56k128r3s3u1p1d1g1_f32_nhwc (u stride, p padding, d "
                                "dilation, g groups; pairs as p1x2; dtypes f64 f32 bf16 f16; layouts nchw nhwc)");
  }

 private:
  const std::string& text_;
  size_t at_ = 0;
};

}  // namespace

std::string to_string(const ConvProblem& a) {
  std::string out = "n" + std::to_string(a.n) + "c" + std::to_string(a.c) + "h" + std::to_string(a.h) + "w" +
                    std::to_string(a.w) + "k" + std::to_string(a.k) + "r" + std::to_string(a.r) + "s" +
                    std::to_string(a.s) + pair('u', a.stride_h, a.stride_w);
  // Zero padding at the far edges is what the output size says it must be; two numbers where both sides are equal.
  int64_t bottom = (a.p - 1) * a.stride_h + a.dilation_h * (a.r - 1) + 1 - a.h - a.pad_top;
  int64_t right = (a.q - 1) * a.stride_w + a.dilation_w * (a.s - 1) + 1 - a.w - a.pad_left;
  bool even = bottom <= a.pad_top && bottom > a.pad_top - a.stride_h && right <= a.pad_left && right > a.pad_left - a.stride_w;
  if (even) {
    out += pair('p', a.pad_top, a.pad_left);
  } else {
    out += "p" + std::to_string(a.pad_top) + "x" + std::to_string(bottom > 0 ? bottom : 0) + "x" +
           std::to_string(a.pad_left) + "x" + std::to_string(right > 0 ? right : 0);
  }
  return out + pair('d', a.dilation_h, a.dilation_w) + "g" + std::to_string(a.groups) + "_" + name(a.dtype) + "_" + name(a.layout);
}

ConvProblem parse_conv_problem(const std::string& text) {
  Scanner in(text);
  ConvProblem a{};
  a.n = in.number('n');
  a.c = in.number('c');
  a.h = in.number('h');
  a.w = in.number('w');
  a.k = in.number('k');
  a.r = in.number('r');
  a.s = in.number('s');
  in.two('u', a.stride_h, a.stride_w);
  int64_t pad[4];
  int pads = in.numbers('p', pad, 4);
  if (pads == 3) in.fail("padding takes one, two or four numbers (top, bottom, left, right)");
  int64_t bottom = pad[pads == 4 ? 1 : 0], right = pad[pads - 1];
  a.pad_top = pad[0];
  a.pad_left = pad[pads == 4 ? 2 : pads - 1];
  in.two('d', a.dilation_h, a.dilation_w);
  a.groups = in.number('g');
  std::string dtype = in.word(), layout = in.word();
  if (dtype == "f64") a.dtype = DType::f64;
  else if (dtype == "f32") a.dtype = DType::f32;
  else if (dtype == "bf16") a.dtype = DType::bf16;
  else if (dtype == "f16") a.dtype = DType::f16;
  else in.fail("dtype '" + dtype + "' is none of f64 f32 bf16 f16");
  if (layout == "nchw") a.layout = Layout::nchw;
  else if (layout == "nhwc") a.layout = Layout::nhwc;
  else in.fail("layout '" + layout + "' is none of nchw nhwc");
  if (a.stride_h < 1 || a.stride_w < 1 || a.dilation_h < 1 || a.dilation_w < 1 || a.groups < 1 || a.r < 1 || a.s < 1)
    in.fail("filter size, stride, dilation and groups must be at least 1");
  if (a.c % a.groups || a.k % a.groups) in.fail("c and k must be divisible by g");
  a.p = out_size(a.h, a.pad_top + bottom, a.dilation_h, a.r, a.stride_h);
  a.q = out_size(a.w, a.pad_left + right, a.dilation_w, a.s, a.stride_w);
  if (a.h + a.pad_top + bottom < a.dilation_h * (a.r - 1) + 1 || a.w + a.pad_left + right < a.dilation_w * (a.s - 1) + 1)
    in.fail("the filter is larger than the padded input");
  return a;
}

}  // namespace convkit
