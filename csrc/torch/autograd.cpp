// Derivatives. A gradient is made of operators again (those of module.cpp, and PyTorch's), so it has derivatives itself:
//
//     y  = conv2d(x, w)        gx = conv2d_input_grad(gy, w)      gw = conv2d_weight_grad(gy, x)
//
// and the gradients of these are again among the three. An operator's entry at the dispatch key Autograd is the function
// of its name, which runs the kernel and leaves a node in the graph; the node, `...Backward`, holds what its formula needs
// and computes only what is asked. C++ and not Python, because a step of a small network is mostly such calls: PyTorch's
// wrapper for formulas in Python takes 50 microseconds a call, this takes 2.
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <algorithm>
#include <mutex>
#include <string>
#include <typeinfo>
#include <vector>

#include "operators.h"
#include "tensors.h"

namespace convkit::autograd {

using c10::SymInt;
using c10::SymIntArrayRef;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::SwapSavedVariables;
using NodePointer = decltype(torch::autograd::Edge::function);  // shared_ptr, or since torch 2.13 intrusive_ptr
using Integers = std::vector<int64_t>;
using Sizes = std::vector<SymInt>;

// ------------------------------------------------------------------------------------------------------ a node's duties
// Besides its formula, `gradients`, a node says in `fields` what it holds other than tensors: each(field) for all of them.
template <class Self> struct Derivative : Node {
  // The gradients of the operator's tensor arguments, in their order; undefined for those that aren't wanted.
  virtual variable_list gradients(const variable_list& grads) = 0;

  variable_list apply(variable_list&& grads) final {
    std::lock_guard<std::mutex> one_thread(mutex_);
    return arrived(grads) ? gradients(grads) : variable_list(num_outputs());  // from nothing comes nothing
  }
  static bool arrived(const variable_list& grads) {
    return std::any_of(grads.begin(), grads.end(), [](const Tensor& grad) { return grad.defined(); });
  }

  bool wanted(size_t argument) { return detached ? detached->wanted[argument] : task_should_compute_output(argument); }

  void save(const Tensor& t, bool is_output = false) { saved.emplace_back(t, is_output); }
  void save(const OptionalTensor& t) { saved.emplace_back(t, false); }
  void save_if(bool needed, const OptionalTensor& t) { save(needed ? t : OptionalTensor()); }

  // What was saved, in the order of saving, undefined for what was not given.
  template <size_t n> std::array<Tensor, n> unpack() {
    variable_list tensors = unpack();
    TORCH_INTERNAL_ASSERT(tensors.size() == n);
    std::array<Tensor, n> result;
    std::move(tensors.begin(), tensors.end(), result.begin());
    return result;
  }
  variable_list unpack() {
    if (detached) return detached->tensors;
    variable_list tensors;
    for (const SavedVariable& s : saved) tensors.push_back(s.unpack(getptr()));
    return tensors;
  }

  void release_variables() override {
    std::lock_guard<std::mutex> one_thread(mutex_);
    for (SavedVariable& s : saved) s.reset_data();
  }

  // The rest is for compiled autograd, which traces a backward pass as one function. It asks what a node holds, to know
  // whether it has traced the like before; then it has the node state its formula as a function of IValues, and what to
  // call it with: these are symbols by then (`swap`). The function works on a node outside of any graph, `detached`.
  void compiled_args(CompiledNodeArgs& args) const override {
    args.collect(std::string(typeid(Self).name()));
    args.collect(saved, true);
    Self::fields(static_cast<const Self&>(*this), [&](const auto& field) { args.collect(field); });
  }

  variable_list apply_with_saved(const variable_list& grads, SwapSavedVariables& swap) override {
    using namespace torch::dynamo::autograd;
    auto& self = static_cast<Self&>(*this);
    swap.before(saved);
    Self::fields(self, [&](auto& field) { swap.before(field); });
    PackedArgs packed;
    packed.pack(unpack());
    std::vector<bool> needed;
    for (size_t i = 0; i < num_outputs(); ++i) needed.push_back(wanted(i));
    packed.pack(needed);
    Self::fields(self, [&](const auto& field) { packed.pack(field); });

    std::vector<at::TypePtr> types;
    for (const at::IValue& value : packed.vec()) types.push_back(value.type());
    const auto& compiler = getPyCompilerInterface();
    std::string function = compiler->bind_function(swap.get_py_compiler(), typeid(Self).name(), detached_gradients, types, /*is_custom_function=*/true, /*is_traceable=*/true);
    auto about_results = IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(get_input_metadata(next_edges()));
    variable_list result = compiler->call_function(swap.get_py_compiler(), "apply_functional", function, grads, packed.vec(), about_results);
    swap.after(saved);
    Self::fields(self, [&](auto& field) { swap.after(field); });
    return result;
  }

  static variable_list detached_gradients(const variable_list& grads, const std::vector<at::IValue>& values) {
    torch::dynamo::autograd::PackedArgs packed(values);
    Self node;
    node.detached.emplace();
    node.detached->tensors = packed.template unpack<variable_list>();
    node.detached->wanted = packed.template unpack<std::vector<bool>>();
    Self::fields(node, [&](auto& field) { field = packed.template unpack<std::decay_t<decltype(field)>>(); });
    return arrived(grads) ? node.gradients(grads) : variable_list(node.detached->wanted.size());
  }

  struct Detached {
    variable_list tensors;
    std::vector<bool> wanted;
  };
  std::optional<Detached> detached;
  std::vector<SavedVariable> saved;
};

template <class T> NodePointer make_node() {
  if constexpr (std::is_same_v<NodePointer, std::shared_ptr<Node>>) return NodePointer(new T, [](auto* node) { deleteNode(node); });
  else return c10::make_intrusive<T>();
}

// The node of a call of `op` with these tensors (optional or not), null where no gradient can be asked for. Then, where
// it isn't null: save(…) the arguments, fields, returns(…) the results, save(…) them.
template <class T> struct Recorder {
  template <class... Tensors> explicit Recorder(const char* op, const Tensors&... arguments) {
    using namespace torch::autograd;
    TORCH_CHECK_NOT_IMPLEMENTED(!(isFwGradDefined(arguments) || ...), "convkit.", op,
                                ": got a tangent; accepts reverse-mode differentiation only: use torch.autograd.grad, torch.func.grad or torch.func.vjp in place of jvp and forward_ad");
    if (!compute_requires_grad(arguments...)) return;
    pointer = make_node<T>();
    node = static_cast<T*>(pointer.get());
    node->set_next_edges(collect_next_edges(arguments...));
  }
  void returns(const Tensor& result) { torch::autograd::set_history(result, pointer); }
  explicit operator bool() const { return node != nullptr; }
  T* operator->() { return node; }

  NodePointer pointer;
  T* node = nullptr;
};

// The kernel itself: the same operator again, below autograd.
template <class Op, class... Args> auto below(const Args&... arguments) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return Op::call(arguments...);
}

bool needs_grad(const Tensor& t) { return t.requires_grad(); }
bool needs_grad(const OptionalTensor& t) { return t.has_value() && t->requires_grad(); }

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : OptionalTensor(); }
Sizes image_size(const Tensor& t) { return {t.sym_size(2), t.sym_size(3)}; }
// Filters, height and width of a weight.
Sizes kernel_size(const Tensor& w) { return {w.sym_size(0), w.sym_size(2), w.sym_size(3)}; }

// Before a ReLU whose output is known; NaN lets the gradient through, as in torch.
Tensor relu_grad(const Tensor& grad, const Tensor& output) { return at::threshold_backward(grad, output, 0); }

// ---------------------------------------------------------------------------------------------------------- convolution

struct Geometry {
  Integers stride, padding, dilation;
  int64_t groups = 1;
  static void fields(auto& self, auto&& each) { each(self.stride), each(self.padding), each(self.dilation), each(self.groups); }
  Geometry() = default;
  Geometry(IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups) : stride(stride.vec()), padding(padding.vec()), dilation(dilation.vec()), groups(groups) {}

  Tensor fprop(const Tensor& input, const Tensor& weight) const { return op::conv2d::call(input, weight, {}, stride, padding, dilation, groups, {}, {}, {}); }
  Tensor input_grad(const Tensor& grad, const Tensor& weight, SymIntArrayRef size, bool channels_last) const {
    return op::conv2d_input_grad::call(grad, weight, size, stride, padding, dilation, groups, channels_last);
  }
  Tensor weight_grad(const Tensor& grad, const Tensor& input, SymIntArrayRef kernel, bool channels_last) const {
    return op::conv2d_weight_grad::call(grad, input, kernel, stride, padding, dilation, groups, channels_last);
  }
};

struct Conv2dBackward : Derivative<Conv2dBackward> {
  Geometry geometry;
  Sizes input_size, kernel;  // kept apart so that no tensor is held for a size's sake
  bool channels_last;
  at::ScalarType bias_type;
  static void fields(auto& self, auto&& each) { Geometry::fields(self.geometry, each), each(self.input_size), each(self.kernel), each(self.channels_last), each(self.bias_type); }

  // A convolution of zero channels has an empty result (PyTorch's rule), which tells nothing of bias and scale.
  Tensor sums(const Tensor& images) const { return images.sym_size(1) != 0 ? op::channel_sum::call(images) : images.new_zeros_symint({kernel[0]}); }

  // With a scale s: y = s * conv2d(x, w) = conv2d(x, s * w), which spares products of the images' size. Only the gradient
  // of s needs conv2d(x, w) itself, which is computed again for it.
  variable_list gradients(const variable_list& grads) override {
    auto [input, weight, scale, output] = unpack<4>();
    enum { kInput, kWeight, kBias, kScale, kResidual, kArguments };
    variable_list result(kArguments);
    Tensor grad = output.defined() ? relu_grad(grads[0], output) : grads[0];
    Tensor factor = scale.defined() ? scale.view({-1, 1, 1, 1}) : Tensor();
    if (wanted(kInput)) {
      Tensor scaled = factor.defined() ? (weight * factor).to(weight.scalar_type()) : weight;
      result[kInput] = geometry.input_grad(grad, scaled, input_size, channels_last);
    }
    if (wanted(kWeight)) {
      result[kWeight] = geometry.weight_grad(grad, input, kernel, channels_last);
      if (factor.defined()) result[kWeight] = (result[kWeight] * factor).to(grad.scalar_type());
    }
    if (wanted(kBias)) result[kBias] = sums(grad.to(bias_type));
    if (wanted(kScale)) result[kScale] = sums(grad.to(compute_type(grad.scalar_type())) * geometry.fprop(input, weight)).to(scale.scalar_type());
    if (wanted(kResidual)) result[kResidual] = grad;
    return result;
  }
};

Tensor conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
              Activation activation, const OptionalTensor& scale, const OptionalTensor& residual) {
  Recorder<Conv2dBackward> node("conv2d", input, weight, bias, scale, residual);
  Tensor output = below<op::conv2d>(input, weight, bias, stride, padding, dilation, groups, activation, scale, residual);
  if (node) {
    node->geometry = {stride, padding, dilation, groups};
    node->input_size = image_size(input), node->kernel = kernel_size(weight);
    node->channels_last = is_channels_last(input) || is_channels_last(weight);
    node->bias_type = (bias.has_value() ? *bias : input).scalar_type();
    node->save_if(needs_grad(weight) || needs_grad(scale), input);  // each gradient needs the other argument
    node->save_if(needs_grad(input) || needs_grad(scale), weight);
    node->save_if(needs_grad(input) || needs_grad(weight) || needs_grad(scale), scale);
    node.returns(output);
    node->save(activation.has_value() ? output : Tensor(), true);
  }
  return output;
}

struct Conv2dInputGradBackward : Derivative<Conv2dInputGradBackward> {
  Geometry geometry;
  Sizes kernel;
  bool channels_last;
  static void fields(auto& self, auto&& each) { Geometry::fields(self.geometry, each), each(self.kernel), each(self.channels_last); }

  variable_list gradients(const variable_list& directions) override {
    auto [grad, weight] = unpack<2>();
    variable_list result(2);
    if (wanted(0)) result[0] = geometry.fprop(directions[0], weight);
    if (wanted(1)) result[1] = geometry.weight_grad(grad, directions[0], kernel, channels_last);
    return result;
  }
};

Tensor conv2d_input_grad(const Tensor& grad, const Tensor& weight, SymIntArrayRef input_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                         bool channels_last) {
  Recorder<Conv2dInputGradBackward> node("conv2d_input_grad", grad, weight);
  Tensor result = below<op::conv2d_input_grad>(grad, weight, input_size, stride, padding, dilation, groups, channels_last);
  if (node) {
    node->geometry = {stride, padding, dilation, groups};
    node->kernel = kernel_size(weight), node->channels_last = channels_last;
    node->save_if(needs_grad(weight), grad);
    node->save_if(needs_grad(grad), weight);
    node.returns(result);
  }
  return result;
}

struct Conv2dWeightGradBackward : Derivative<Conv2dWeightGradBackward> {
  Geometry geometry;
  Sizes input_size;
  bool channels_last;
  static void fields(auto& self, auto&& each) { Geometry::fields(self.geometry, each), each(self.input_size), each(self.channels_last); }

  variable_list gradients(const variable_list& directions) override {
    auto [grad, input] = unpack<2>();
    variable_list result(2);
    if (wanted(0)) result[0] = geometry.fprop(input, directions[0]);
    if (wanted(1)) result[1] = geometry.input_grad(grad, directions[0], input_size, channels_last);
    return result;
  }
};

Tensor conv2d_weight_grad(const Tensor& grad, const Tensor& input, SymIntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                          bool channels_last) {
  Recorder<Conv2dWeightGradBackward> node("conv2d_weight_grad", grad, input);
  Tensor result = below<op::conv2d_weight_grad>(grad, input, kernel_size, stride, padding, dilation, groups, channels_last);
  if (node) {
    node->geometry = {stride, padding, dilation, groups};
    node->input_size = image_size(input), node->channels_last = channels_last;
    node->save_if(needs_grad(input), grad);
    node->save_if(needs_grad(grad), input);
    node.returns(result);
  }
  return result;
}

struct ChannelSumBackward : Derivative<ChannelSumBackward> {
  Sizes shape;
  static void fields(auto& self, auto&& each) { each(self.shape); }
  variable_list gradients(const variable_list& directions) override { return {directions[0].view({1, -1, 1, 1}).expand_symint(shape)}; }
};

Tensor channel_sum(const Tensor& grad) {
  Recorder<ChannelSumBackward> node("channel_sum", grad);
  Tensor result = below<op::channel_sum>(grad);
  if (node) {
    node->shape = grad.sym_sizes().vec();
    node.returns(result);
  }
  return result;
}

struct ConvTranspose2dBackward : Derivative<ConvTranspose2dBackward> {
  Geometry geometry;  // of the convolution whose input gradient this is
  Integers cut;       // rows and columns of the output that met no filter
  Sizes kernel;
  bool channels_last;
  static void fields(auto& self, auto&& each) { Geometry::fields(self.geometry, each), each(self.cut), each(self.kernel), each(self.channels_last); }

  variable_list gradients(const variable_list& grads) override {
    auto [input, weight] = unpack<2>();
    variable_list result(3);
    Tensor grad = grads[0];
    if (wanted(2)) result[2] = op::channel_sum::call(grad);
    if (cut[0] >= geometry.stride[0] || cut[1] >= geometry.stride[1])
      grad = grad.slice_symint(2, 0, grad.sym_size(2) - cut[0]).slice_symint(3, 0, grad.sym_size(3) - cut[1]);
    // Results follow the forward's layout. vmap has no contiguous(ChannelsLast).
    if (channels_last) grad = grad.permute({0, 2, 3, 1}).contiguous().permute({0, 3, 1, 2});
    if (wanted(0)) {
      result[0] = geometry.fprop(grad, weight);
      if (!channels_last) result[0] = result[0].contiguous();
    }
    if (wanted(1)) result[1] = geometry.weight_grad(input, grad, kernel, channels_last);
    return result;
  }
};

Tensor conv_transpose2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding, IntArrayRef output_padding,
                        IntArrayRef dilation, int64_t groups) {
  Recorder<ConvTranspose2dBackward> node("conv_transpose2d", input, weight, bias);
  Tensor output = below<op::conv_transpose2d>(input, weight, bias, stride, padding, output_padding, dilation, groups);
  if (node) {
    // Output padding takes away from the convolution's far padding; where it is more than that, the last rows or columns
    // met no filter and the gradient has nothing to read from them.
    Integers sides;
    for (int i = 0; i < 2; ++i) {
      sides.insert(sides.end(), {padding[i], std::max<int64_t>(0, padding[i] - output_padding[i])});
      node->cut.push_back(std::max<int64_t>(0, output_padding[i] - padding[i]));
    }
    node->geometry = {stride, sides, dilation, groups};
    node->kernel = kernel_size(weight);
    node->channels_last = is_channels_last(input) || is_channels_last(weight);
    node->save_if(needs_grad(weight), input);
    node->save_if(needs_grad(input), weight);
    node.returns(output);
  }
  return output;
}

// ------------------------------------------------------------------------------------------------ separable convolution

struct SeparableConv2dBackward : Derivative<SeparableConv2dBackward> {
  Geometry geometry;  // of the depthwise convolution
  bool depthwise_relu, channels_last;
  static void fields(auto& self, auto&& each) { Geometry::fields(self.geometry, each), each(self.depthwise_relu), each(self.channels_last); }

  static Tensor affine(Tensor x, const Tensor& scale, const Tensor& shift, at::ScalarType type) {
    if (scale.defined()) x = x * scale.view({-1, 1, 1});
    if (shift.defined()) x = x + shift.view({-1, 1, 1});
    return x.to(type);
  }
  static Tensor per_channel(const Tensor& x, const Tensor& like) { return x.sum({0, 2, 3}).to(like.scalar_type()); }

  // Keeps no intermediate from the forward pass: the depthwise result is computed again, at 1/K of the arithmetic.
  variable_list gradients(const variable_list& grads) override {
    auto [input, depthwise, pointwise, depthwise_scale, depthwise_shift, scale, shift, output] = unpack<8>();
    enum { kInput, kDepthwise, kPointwise, kDepthwiseScale, kDepthwiseShift, kScale, kShift, kArguments };
    variable_list result(kArguments);
    const Geometry pixel({1, 1}, {0, 0, 0, 0}, {1, 1}, 1);
    at::ScalarType type = input.scalar_type();
    Tensor grad = output.defined() ? relu_grad(grads[0], output) : grads[0];
    Tensor bare = geometry.fprop(input, depthwise);
    Tensor middle = affine(bare, depthwise_scale, depthwise_shift, type);
    if (depthwise_relu) middle = middle.relu();
    if (wanted(kShift)) result[kShift] = per_channel(grad, shift);
    if (wanted(kScale)) result[kScale] = per_channel(grad * pixel.fprop(middle, pointwise), scale);
    grad = affine(grad, scale, {}, type);
    if (wanted(kPointwise)) result[kPointwise] = pixel.weight_grad(grad, middle, kernel_size(pointwise), channels_last);
    if (!wanted(kInput) && !wanted(kDepthwise) && !wanted(kDepthwiseScale) && !wanted(kDepthwiseShift)) return result;
    grad = pixel.input_grad(grad, pointwise, image_size(middle), channels_last);
    if (depthwise_relu) grad = relu_grad(grad, middle);
    if (wanted(kDepthwiseShift)) result[kDepthwiseShift] = per_channel(grad, depthwise_shift);
    if (wanted(kDepthwiseScale)) result[kDepthwiseScale] = per_channel(grad * bare, depthwise_scale);
    grad = affine(grad, depthwise_scale, {}, type);
    if (wanted(kInput)) result[kInput] = geometry.input_grad(grad, depthwise, image_size(input), channels_last);
    if (wanted(kDepthwise)) result[kDepthwise] = geometry.weight_grad(grad, input, kernel_size(depthwise), channels_last);
    return result;
  }
};

Tensor separable_conv2d(const Tensor& input, const Tensor& depthwise_weight, const Tensor& pointwise_weight, const OptionalTensor& depthwise_scale,
                        const OptionalTensor& depthwise_shift, Activation depthwise_activation, const OptionalTensor& scale, const OptionalTensor& shift, Activation activation,
                        IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation) {
  Recorder<SeparableConv2dBackward> node("separable_conv2d", input, depthwise_weight, pointwise_weight, depthwise_scale, depthwise_shift, scale, shift);
  Tensor output = below<op::separable_conv2d>(input, depthwise_weight, pointwise_weight, depthwise_scale, depthwise_shift, depthwise_activation, scale, shift, activation, stride,
                                              padding, dilation);
  if (node) {
    node->geometry = {stride, padding, dilation, input.size(1)};
    node->depthwise_relu = depthwise_activation.has_value();
    node->channels_last = is_channels_last(input) || is_channels_last(depthwise_weight) || is_channels_last(pointwise_weight);
    for (const Tensor& t : {input, depthwise_weight, pointwise_weight}) node->save(t);
    for (const OptionalTensor& t : {depthwise_scale, depthwise_shift, scale, shift}) node->save(t);
    node.returns(output);
    node->save(activation.has_value() ? output : Tensor(), true);
  }
  return output;
}

// ------------------------------------------------------------------------------------------ batch normalisation + ReLU

struct BatchNormReluBackward : Derivative<BatchNormReluBackward> {
  double eps;
  bool training, has_residual;
  static void fields(auto& self, auto&& each) { each(self.eps), each(self.training), each(self.has_residual); }

  variable_list gradients(const variable_list& grads) override {
    auto [input, weight, bias, mean, var, mask] = unpack<6>();
    CONVKIT_CHECK(!has_residual || mask.sym_numel() != 0 || input.sym_numel() == 0, "batch_norm_relu", "save_mask", "got False; a gradient with a residual needs True");
    if (!has_residual) mask = Tensor();
    std::array<bool, 4> need = {wanted(0), wanted(1), wanted(2), wanted(3)};
    auto [to_input, to_residual, to_weight, to_bias] =
        op::batch_norm_relu_grad::call(grads[0], input, optional(weight), optional(bias), mean, var, optional(mask), eps, training, need);
    return {need[0] ? to_input : Tensor(), need[1] ? to_residual : Tensor(), need[2] ? to_weight : Tensor(), need[3] ? to_bias : Tensor()};
  }
};

op::Four batch_norm_relu(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& mean,
                         const OptionalTensor& var, double eps, bool save_mask) {
  Recorder<BatchNormReluBackward> node("batch_norm_relu", input, residual, weight, bias);
  op::Four outputs = below<op::batch_norm_relu>(input, residual, weight, bias, mean, var, eps, save_mask);
  if (node) {
    auto& [output, batch_mean, batch_var, mask] = outputs;
    node->eps = eps, node->training = !mean.has_value(), node->has_residual = residual.has_value();
    node->save(input), node->save(weight), node->save(bias);
    node.returns(output);
    node->save(batch_mean), node->save(batch_var), node->save(mask);  // these three have no gradient of their own
  }
  return outputs;
}

struct BatchNormReluGradBackward : Derivative<BatchNormReluGradBackward> {
  double eps;
  bool training;
  static void fields(auto& self, auto&& each) { each(self.eps), each(self.training); }

  // Gradients of <v, input_grad> + <u, residual_grad> + <a, weight_grad> + <b, bias_grad>, in plain PyTorch. With z the
  // normalised input, r = 1 / sqrt(var + eps), g = mask * grad and means over a channel: input_grad = weight * r * (g -
  // mean(g) - z * mean(g * z)), weight_grad = sum(g * z), bias_grad = sum(g). The statistics are computed from the input
  // again, so that these formulas can be differentiated further.
  variable_list gradients(const variable_list& directions) override {
    auto [grad, input, weight, bias, mean, var, mask] = unpack<7>();
    at::ScalarType wide = compute_type(input.scalar_type());
    Tensor v = directions[0], u = directions[1], a = directions[2], b = directions[3];
    // The kernel's own mask, exactly: what it lets through of a gradient of ones.
    Tensor passes = std::get<1>(op::batch_norm_relu_grad::call(at::ones_like(input), input.detach(), optional(weight), optional(bias), mean, var, optional(mask), eps, training,
                                                               {false, true, false, false}));
    auto channel = [&](const Tensor& x) { return x.to(wide).view({1, -1, 1, 1}); };
    auto sum = [](const Tensor& x) { return x.sum({0, 2, 3}, true); };
    auto average = [](const Tensor& x) { return x.mean({0, 2, 3}, true); };

    Tensor x = input.to(wide), m = passes.detach().to(wide), g = grad.to(wide) * m, centre, r;
    if (training) {
      centre = x - average(x);
      r = (average(centre * centre) + eps).rsqrt();
    } else {
      centre = x - channel(mean);
      r = (channel(var) + eps).rsqrt();
    }
    Tensor z = centre * r, wr = weight.defined() ? channel(weight) * r : r;
    Tensor to_grad = at::zeros_like(x), to_z = at::zeros_like(x), to_r, to_weight;  // to_grad: before the mask
    if (v.defined()) {
      v = v.to(wide);
      if (training) {
        Tensor gz = average(g * z), vz = average(v * z);
        to_grad = to_grad + wr * (v - average(v) - z * vz);
        to_z = to_z - wr * (gz * v + vz * g);
        to_r = wr * (average(v * g) - average(v) * average(g) - gz * vz);  // times the number of values, and r
        to_weight = r * (sum(v * g) - sum(v) * average(g) - gz * sum(v * z));
      } else {
        to_grad = to_grad + wr * v;
        to_weight = sum(v * g * r);
      }
    }
    if (u.defined()) to_grad = to_grad + u.to(wide);
    if (a.defined()) to_grad = to_grad + channel(a) * z, to_z = to_z + channel(a) * g;
    if (b.defined()) to_grad = to_grad + channel(b);

    variable_list result(4);
    if (wanted(0)) result[0] = (m * to_grad).to(grad.scalar_type());
    if (wanted(1)) {
      Tensor to_input = r * (training ? to_z - average(to_z) - z * average(to_z * z) : to_z);
      if (to_r.defined()) to_input = to_input - to_r * r * z;
      result[1] = to_input.to(input.scalar_type());
    }
    if (wanted(2)) result[2] = to_weight.defined() ? to_weight.flatten().to(weight.scalar_type()) : at::zeros_like(weight);
    return result;
  }
};

op::Four batch_norm_relu_grad(const Tensor& grad, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                              const OptionalTensor& mask, double eps, bool training, std::array<bool, 4> output_mask) {
  Recorder<BatchNormReluGradBackward> node("batch_norm_relu_grad", grad, input, weight, bias);
  op::Four outputs = below<op::batch_norm_relu_grad>(grad, input, weight, bias, mean, var, mask, eps, training, output_mask);
  if (node) {
    node->eps = eps, node->training = training;
    for (const Tensor& t : {grad, input}) node->save(t);
    for (const OptionalTensor& t : {weight, bias, OptionalTensor(mean), OptionalTensor(var), mask}) node->save(t);
    const auto& [to_input, to_residual, to_weight, to_bias] = outputs;
    node.returns(output_mask[0] ? to_input : Tensor());  // each keeps its place among the directions
    node.returns(output_mask[1] ? to_residual : Tensor());
    node.returns(output_mask[2] ? to_weight : Tensor());
    node.returns(output_mask[3] ? to_bias : Tensor());
  }
  return outputs;
}

// ---------------------------------------------------------------------------------- max pooling: its gradient puts values
// where outputs were taken from, and the gradient of that picks them up again

struct Windows {
  Integers kernel_size, stride, padding, dilation;
  bool ceil_mode = false;
  static void fields(auto& self, auto&& each) { each(self.kernel_size), each(self.stride), each(self.padding), each(self.dilation), each(self.ceil_mode); }
  Windows() = default;
  Windows(IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode)
      : kernel_size(kernel_size.vec()), stride(stride.vec()), padding(padding.vec()), dilation(dilation.vec()), ceil_mode(ceil_mode) {}

  Tensor put(const Tensor& grad, const Tensor& taps, SymIntArrayRef size, bool channels_last) const {
    return op::max_pool2d_grad::call(grad, taps, size, kernel_size, stride, padding, dilation, ceil_mode, channels_last);
  }
  Tensor pick(const Tensor& input, const Tensor& taps, bool channels_last) const {
    return op::max_pool2d_pick::call(input, taps, kernel_size, stride, padding, dilation, ceil_mode, channels_last);
  }
};

struct MaxPool2dBackward : Derivative<MaxPool2dBackward> {
  Windows windows;
  Sizes input_size;
  bool channels_last, saved_taps;
  static void fields(auto& self, auto&& each) { Windows::fields(self.windows, each), each(self.input_size), each(self.channels_last), each(self.saved_taps); }

  variable_list gradients(const variable_list& grads) override {
    auto [taps] = unpack<1>();
    CONVKIT_CHECK(saved_taps, "max_pool2d", "save_taps", "got False; a gradient needs True");
    return {windows.put(grads[0], taps, input_size, channels_last)};
  }
};

std::tuple<Tensor, Tensor> max_pool2d(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode,
                                      Activation activation, bool save_taps) {
  Recorder<MaxPool2dBackward> node("max_pool2d", input);
  auto outputs = below<op::max_pool2d>(input, kernel_size, stride, padding, dilation, ceil_mode, activation, save_taps);
  if (node) {
    node->windows = {kernel_size, stride, padding, dilation, ceil_mode};
    node->input_size = image_size(input), node->channels_last = is_channels_last(input), node->saved_taps = save_taps;
    node.returns(std::get<0>(outputs));
    node->save(std::get<1>(outputs));
  }
  return outputs;
}

struct MaxPool2dGradBackward : Derivative<MaxPool2dGradBackward> {
  Windows windows;
  bool channels_last;
  static void fields(auto& self, auto&& each) { Windows::fields(self.windows, each), each(self.channels_last); }

  variable_list gradients(const variable_list& directions) override {
    auto [taps] = unpack<1>();
    return {windows.pick(directions[0], taps, channels_last)};
  }
};

Tensor max_pool2d_grad(const Tensor& grad, const Tensor& taps, SymIntArrayRef input_size, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                       bool ceil_mode, bool channels_last) {
  Recorder<MaxPool2dGradBackward> node("max_pool2d_grad", grad);
  Tensor result = below<op::max_pool2d_grad>(grad, taps, input_size, kernel_size, stride, padding, dilation, ceil_mode, channels_last);
  if (node) {
    node->windows = {kernel_size, stride, padding, dilation, ceil_mode};
    node->channels_last = channels_last;
    node->save(taps);
    node.returns(result);
  }
  return result;
}

struct MaxPool2dPickBackward : Derivative<MaxPool2dPickBackward> {
  Windows windows;
  Sizes input_size;
  bool channels_last;
  static void fields(auto& self, auto&& each) { Windows::fields(self.windows, each), each(self.input_size), each(self.channels_last); }

  variable_list gradients(const variable_list& directions) override {
    auto [taps] = unpack<1>();
    return {windows.put(directions[0], taps, input_size, channels_last)};
  }
};

Tensor max_pool2d_pick(const Tensor& input, const Tensor& taps, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode,
                       bool channels_last) {
  Recorder<MaxPool2dPickBackward> node("max_pool2d_pick", input);
  Tensor result = below<op::max_pool2d_pick>(input, taps, kernel_size, stride, padding, dilation, ceil_mode, channels_last);
  if (node) {
    node->windows = {kernel_size, stride, padding, dilation, ceil_mode};
    node->input_size = image_size(input), node->channels_last = channels_last;
    node->save(taps);
    node.returns(result);
  }
  return result;
}

// ------------------------------------------------------------------------- im2col and col2im: each is the other's gradient

struct Columns {
  Integers kernel_size, dilation, padding, stride;
  static void fields(auto& self, auto&& each) { each(self.kernel_size), each(self.dilation), each(self.padding), each(self.stride); }
  Columns() = default;
  Columns(IntArrayRef kernel_size, IntArrayRef dilation, IntArrayRef padding, IntArrayRef stride)
      : kernel_size(kernel_size.vec()), dilation(dilation.vec()), padding(padding.vec()), stride(stride.vec()) {}
};

struct Im2colBackward : Derivative<Im2colBackward> {
  Columns columns;
  Sizes input_size;
  static void fields(auto& self, auto&& each) { Columns::fields(self.columns, each), each(self.input_size); }
  variable_list gradients(const variable_list& grads) override {
    return {op::col2im::call(grads[0], input_size, columns.kernel_size, columns.dilation, columns.padding, columns.stride)};
  }
};

Tensor im2col(const Tensor& input, IntArrayRef kernel_size, IntArrayRef dilation, IntArrayRef padding, IntArrayRef stride) {
  Recorder<Im2colBackward> node("im2col", input);
  Tensor result = below<op::im2col>(input, kernel_size, dilation, padding, stride);
  if (node) {
    node->columns = {kernel_size, dilation, padding, stride};
    node->input_size = image_size(input);
    node.returns(result);
  }
  return result;
}

struct Col2imBackward : Derivative<Col2imBackward> {
  Columns columns;
  static void fields(auto& self, auto&& each) { Columns::fields(self.columns, each); }
  variable_list gradients(const variable_list& grads) override {
    return {op::im2col::call(grads[0], columns.kernel_size, columns.dilation, columns.padding, columns.stride)};
  }
};

Tensor col2im(const Tensor& input, SymIntArrayRef output_size, IntArrayRef kernel_size, IntArrayRef dilation, IntArrayRef padding, IntArrayRef stride) {
  Recorder<Col2imBackward> node("col2im", input);
  Tensor result = below<op::col2im>(input, output_size, kernel_size, dilation, padding, stride);
  if (node) {
    node->columns = {kernel_size, dilation, padding, stride};
    node.returns(result);
  }
  return result;
}

}  // namespace convkit::autograd

TORCH_LIBRARY_IMPL(convkit, Autograd, m) {
  using namespace convkit::autograd;
  m.impl("conv2d", conv2d);
  m.impl("conv2d_input_grad", conv2d_input_grad);
  m.impl("conv2d_weight_grad", conv2d_weight_grad);
  m.impl("channel_sum", channel_sum);
  m.impl("conv_transpose2d", conv_transpose2d);
  m.impl("separable_conv2d", separable_conv2d);
  m.impl("batch_norm_relu", batch_norm_relu);
  m.impl("batch_norm_relu_grad", batch_norm_relu_grad);
  m.impl("max_pool2d", max_pool2d);
  m.impl("max_pool2d_grad", max_pool2d_grad);
  m.impl("max_pool2d_pick", max_pool2d_pick);
  m.impl("im2col", im2col);
  m.impl("col2im", col2im);
}
