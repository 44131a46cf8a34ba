// Each kernel once over inputs of the sizes that the benchmarks time, counted by callgrind.
#include <cstddef>
#include <initializer_list>
#include <iterator>
#include <string>
#include <vector>

#include "cross_entropy/cross_entropy.h"
#include "pointwise_loss/pointwise_loss.h"
#include "optim/rules.h"

extern "C" void start_counting();
extern "C" void stop_counting(const char* name);

namespace {

using fusedstep::DType;

template <class T>
std::vector<T> numbers(std::int64_t count) {
    std::vector<T> result(static_cast<std::size_t>(count));
    for (std::size_t i = 0; i < result.size(); ++i) {
        auto const x = static_cast<float>(static_cast<int>(i * 2654435761u >> 8) % 1000) / 250 - 2;
        result[i] = fusedstep::from_acc<T>(static_cast<fusedstep::acc_t<T>>(x));
    }
    return result;
}

// Counts a second call: the first one binds symbols and decides the level.
template <class F>
void count(const std::string& name, std::int64_t elements, F f) {
    f();
    start_counting();
    f();
    stop_counting((name + "|" + std::to_string(elements)).c_str());
}

template <class T>
void cross_entropy(const char* dtype_name, DType dtype, std::int64_t rows, std::int64_t classes,
                   bool classes_last, bool smoothed) {
    using namespace fusedstep::cross_entropy;
    std::vector<T> const logits = numbers<T>(rows * classes);
    std::vector<T> grad(logits.size());
    std::vector<std::int64_t> target(static_cast<std::size_t>(rows));
    for (std::size_t row = 0; row < target.size(); ++row) {
        target[row] = static_cast<std::int64_t>(row * 2654435761u % std::size_t(classes));
    }
    std::vector<fusedstep::acc_t<T>> stats(static_cast<std::size_t>(8 * rows));  // more than enough
    fusedstep::acc_t<T> const one = 1;
    Args args{};
    args.rows = rows;
    args.classes = classes;
    args.row_dims = 1;
    args.row_sizes[0] = rows;
    args.dtype = dtype;
    args.logits = logits.data();
    args.logits_class_stride = classes_last ? 1 : rows;
    args.logits_row_strides[0] = classes_last ? classes : 1;
    args.grad_class_stride = args.logits_class_stride;
    args.grad_row_strides[0] = args.logits_row_strides[0];
    args.target_kind = smoothed ? TargetKind::smoothed_index : TargetKind::index;
    args.label_smoothing = smoothed ? 0.1 : 0;
    args.weight_sum = static_cast<double>(classes);
    args.target_index = target.data();
    args.ignore_index = -100;
    args.gradient_scale = 1.0 / static_cast<double>(rows);
    args.loss_dtype = dtype;
    args.row_stats = stats.data();
    args.grad_output = &one;

    std::string const what = std::string("cross_entropy ") + dtype_name + " " +
                             std::to_string(rows) + "x" + std::to_string(classes) +
                             (classes_last ? "" : " strided") + (smoothed ? " smoothed" : "");
    std::int64_t const chunk = rows_per_chunk(rows, classes);
    auto const each_chunk = [&](auto f) {
        for (std::int64_t row = 0; row < rows; row += chunk) {
            f(row, row + chunk < rows ? row + chunk : rows);
        }
    };
    auto const forward = [&] {
        each_chunk([&](std::int64_t begin, std::int64_t end) {
            cpu_kernels().scan_targets(args, begin, end);
            cpu_kernels().forward(args, begin, end);
        });
    };
    count(what + " loss", rows * classes, forward);
    args.grad = grad.data();
    count(what + " loss and gradient", rows * classes, forward);
    count(what + " backward", rows * classes, [&] {
        each_chunk([&](std::int64_t begin, std::int64_t end) {
            cpu_kernels().backward(args, begin, end);
        });
    });
}

template <class T>
void pointwise_loss(const char* dtype_name, DType dtype) {
    using namespace fusedstep::pointwise_loss;
    constexpr std::int64_t kNumel = 64 * 1000;
    const char* const names[] = {"l1", "mse", "smooth_l1", "huber", "bce_with_logits"};
    std::vector<T> input = numbers<T>(kNumel), target = numbers<T>(kNumel + 1), grad(kNumel);
    std::vector<T> grad_output = numbers<T>(kNumel);
    Args args{};
    args.parameter = 1;
    args.numel = kNumel;
    args.dims = 1;
    args.sizes[0] = kNumel;
    args.adjacent = true;
    args.dtype = args.target_dtype = args.loss_dtype = args.grad_output_dtype = dtype;
    args.input = {input.data(), {1}};
    args.target = {target.data() + 1, {1}};
    args.grad = {grad.data(), {1}};
    args.grad_output = {grad_output.data(), {1}};
    for (std::size_t kind = 0; kind < std::size(names); ++kind) {
        args.kind = static_cast<Kind>(kind);
        args.derivative_scale = derivative_scale(args.kind, args.parameter, kNumel, dtype);
        std::string const what = std::string(names[kind]) + " " + dtype_name;
        count(what + " loss and gradient", kNumel, [&] {
            for (std::int64_t i = 0; i < kNumel; i += kChunk) {
                cpu_kernels().forward(args, i, i + kChunk < kNumel ? i + kChunk : kNumel);
            }
        });
        count(what + " backward", kNumel, [&] { cpu_kernels().backward(args, 0, kNumel); });
    }
}

// Of a group of an optimizer's that is named.
template <class Rule>
struct Group {
    const char* name;
    typename Rule::Hyperparameters hyperparameters;
};

template <class Rule, std::size_t index, class T>
void optimizer(const char* name, const char* dtype_name, DType dtype,
               std::initializer_list<Group<Rule>> groups) {
    using namespace fusedstep::optim;
    constexpr std::int64_t kNumel = 100 * 1000;
    std::vector<T> param = numbers<T>(kNumel), grad = numbers<T>(kNumel);
    std::vector<std::vector<T>> states(kStates<Rule>, numbers<T>(kNumel));
    for (const Group<Rule>& group : groups) {
        Entry entry{};
        entry.extent = {0, kNumel};
        entry.param = param.data();
        entry.grad = grad.data();
        for (std::size_t i = 0; i < states.size(); ++i) {
            bool const kept = Rule::states_of(group.hyperparameters) >> i & 1;
            entry.states[i] = kept ? states[i].data() : nullptr;
        }
        entry.dtype = dtype;
        Step step{};
        step.groups = &group.hyperparameters;
        step.group_count = 1;
        step.entries = &entry;
        step.entry_count = 1;
        step.grad_scale = 1;
        count(std::string(name) + " " + dtype_name + " " + group.name, kNumel,
              [&] { cpu_kernels().update[index](step, 0, entry.extent.end_chunk()); });
    }
}

template <class T>
void optimizers(const char* dtype_name, DType dtype) {
    using namespace fusedstep::optim;
    LearningRate const lr{1e-3, nullptr, DType::float64};
    optimizer<Sgd, 0, T>("sgd", dtype_name, dtype,
                         {{"plain", {lr, 0, 0, 0, false, false}},
                          {"momentum", {lr, 0.9, 0, 0, false, false}},
                          {"nesterov and weight decay", {lr, 0.9, 0, 1e-4, true, false}}});
}

}  // namespace

int main() {
    using fusedstep::bfloat16;
    for (auto [rows, classes] :
         {std::pair{1, 10}, {64, 10}, {512, 10}, {256, 100}, {64, 1000}, {8, 32000}}) {
        cross_entropy<float>("float32", DType::float32, rows, classes, true, false);
    }
    cross_entropy<float>("float32", DType::float32, 4096, 21, false, false);
    cross_entropy<float>("float32", DType::float32, 64, 1000, true, true);
    cross_entropy<bfloat16>("bfloat16", DType::bfloat16, 64, 1000, true, false);
    cross_entropy<double>("float64", DType::float64, 64, 1000, true, false);
    pointwise_loss<float>("float32", DType::float32);
    pointwise_loss<bfloat16>("bfloat16", DType::bfloat16);
    optimizers<float>("float32", DType::float32);
    optimizers<bfloat16>("bfloat16", DType::bfloat16);
}
