// What is to be computed, as plain values: no torch, no pointers. The text form of a problem
// (`n32c64h56w56k128r3s3u1p1d1g1_bf16_nhwc`) is the same in tests, benches, plans and error reports.
#pragma once

#include <cstdint>
#include <string>

namespace convkit {

enum class DType : int { f64, f32, bf16, f16 };
enum class Layout : int { nchw, nhwc };
enum class Pass : int { forward, input_grad, weight_grad };

const char* name(DType);
const char* name(Layout);
const char* name(Pass);

// Bytes of one stored element, and of one element in the arithmetic: 16-bit types are computed in float32.
constexpr int64_t storage_bytes(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }
constexpr int64_t compute_bytes(DType t) { return t == DType::f64 ? 8 : 4; }

// x (n, c, h, w) * weight (k, c / groups, r, s) -> y (n, k, p, q). Padding is zero and may be one-sided: only where
// the first tap stands (pad_top, pad_left) and the output size matter, what is beyond the far edge is implied by them.
struct ConvProblem {
  int64_t n, c, h, w;
  int64_t k, r, s;
  int64_t p, q;
  int64_t stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int64_t groups;
  DType dtype;
  Layout layout;

  bool is_depthwise() const { return groups == c && k == c; }  // one filter a channel
};

std::string to_string(const ConvProblem&);

// The inverse of to_string, with p and q worked out. Throws std::invalid_argument that names the part which is wrong.
ConvProblem parse_conv_problem(const std::string& text);

// im2col and col2im: image (n, c, h, w) <-> columns (n, c * r * s, p * q).
struct ColumnsProblem {
  int64_t n, c, h, w, r, s, p, q;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// Max pooling: x (n, c, h, w) -> y (n, c, p, q), the largest of the r x s taps of a window that lie in the image.
struct MaxPoolProblem {
  int64_t n, c, h, w, r, s, p, q;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  DType dtype;
  Layout layout;
};

}  // namespace convkit
