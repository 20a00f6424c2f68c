// Compiled graphs from C++: bound to their tensors once, and called without holding Python's lock.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/custom_class.h>

#include <string>
#include <unordered_map>
#include <vector>

namespace omni {
namespace {

// An AOTInductor package with the tensors it works on. Methods of such classes run without the interpreter's lock, so
// that the host can plan the next step meanwhile.
struct Package : torch::CustomClassHolder {
  // One runner without locks of its own: a step is never run by two threads at once.
  explicit Package(const std::string& path) : loader_(path, "model", /*run_single_threaded=*/true, 1, -1) {}

  std::vector<std::string> constant_names() { return loader_.get_constant_fqns(); }

  // Weights stay the caller's memory: all packages of a model share one copy.
  void bind(const c10::Dict<std::string, at::Tensor>& constants, std::vector<at::Tensor> inputs) {
    std::unordered_map<std::string, at::Tensor> named;
    for (const auto& entry : constants) named.emplace(entry.key(), entry.value());
    loader_.load_constants(named, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
    constants_ = constants;
    inputs_ = std::move(inputs);
  }

  at::Tensor run() {
    auto outputs = loader_.run(inputs_);
    TORCH_CHECK(outputs.size() == 1, "a decode step must have one output: ", outputs.size());
    return outputs[0];
  }

 private:
  torch::inductor::AOTIModelPackageLoader loader_;
  std::optional<c10::Dict<std::string, at::Tensor>> constants_;  // keeps their memory
  std::vector<at::Tensor> inputs_;
};

}  // namespace
}  // namespace omni

TORCH_LIBRARY_FRAGMENT(omni, library) {
  library.class_<omni::Package>("Package")
      .def(torch::init<const std::string&>())
      .def("constant_names", [](const c10::intrusive_ptr<omni::Package>& self) { return self->constant_names(); })
      .def("bind",
           [](const c10::intrusive_ptr<omni::Package>& self, const c10::Dict<std::string, at::Tensor>& constants,
              std::vector<at::Tensor> inputs) { self->bind(constants, std::move(inputs)); })
      .def("run", [](const c10::intrusive_ptr<omni::Package>& self) { return self->run(); });
}
