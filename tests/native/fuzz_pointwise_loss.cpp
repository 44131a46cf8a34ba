// The kernels of pointwise_loss/ on any contract, against the formulas of its math.h.
#include "harness.h"
#include "pointwise_loss/pointwise_loss.h"

namespace native {
namespace {

using fusedstep::pointwise_loss::Args;
using fusedstep::pointwise_loss::CpuKernels;
using fusedstep::pointwise_loss::Kind;
using fusedstep::pointwise_loss::kMaxDims;
using fusedstep::pointwise_loss::Operand;

struct Point {
    Expected loss{0, 0}, derivative{0, 0};
};

Real absolute(Real x) { return std::fabs(x); }
Real sign(Real x) { return x > 0 ? 1 : x < 0 ? -1 : 0; }

// `parameter` is beta, delta, or pos_weight of this point.
Point point(Kind kind, DType computed, Real x, Real t, Real parameter) {
    Real const d = rounded(computed, x - t);
    Real const size = absolute(d);
    switch (kind) {
        case Kind::l1:
            return {{size, size}, {sign(d), 1}};
        case Kind::mse:
            return {{d * d, d * d}, {2 * d, 2 * size}};
        case Kind::smooth_l1:
            if (!(size >= parameter)) {  // NaN stays NaN
                // d^2 underflows before it is divided, or overflows.
                return {{d * d / (2 * parameter), d * d / (2 * parameter), 1 / parameter, d * d},
                        {d / parameter, size / parameter}};
            }
            return {{size - parameter / 2, size + parameter}, {sign(d), 1}};
        case Kind::huber:
            if (!(size > parameter)) return {{d * d / 2, d * d}, {d, size}};
            return {{parameter * (size - parameter / 2), parameter * (size + parameter), parameter},
                    {parameter * sign(d), parameter}};
        case Kind::bce_with_logits:
        case Kind::weighted_bce:
            break;
    }
    bool const weighted = kind == Kind::weighted_bce;
    Real const q = weighted ? parameter : 1;
    Real const softplus = std::log1p(std::exp(-absolute(x))) + (x < 0 ? -x : 0);
    Real const sigmoid = x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x));
    Real const t_size = 1 + absolute(t), q_size = 1 + (1 + absolute(q)) * absolute(t);
    // The logistic function turns an error of its argument into one of its value.
    Real const sigmoid_size = sigmoid + (std::isinf(x) ? 0 : std::exp(-absolute(x)) * absolute(x));
    return {{(1 - t) * x + (weighted ? (1 + (q - 1) * t) * softplus : softplus),
             t_size * absolute(x) + q_size * softplus, q_size + absolute(x), q_size},
            {weighted ? (1 - t + q * t) * sigmoid - q * t : sigmoid - t,
             (t_size + q_size) * sigmoid_size + absolute(q * t), q_size + t_size, q_size}};
}

struct Case {
    explicit Case(Choices& choices);
    void check(const CpuKernels& kernels);

    Choices& choices;
    DType dtype, computed;
    std::int64_t numel;
    std::vector<std::int64_t> sizes;
    Args args{};
    double divisor;  // of the loss
    std::unique_ptr<Array> input, target, weight, pos_weight, grad, loss, grad_output;
    std::vector<Point> expected;
    const char* level = "";

private:
    std::unique_ptr<Array> add(Operand& operand, DType type, bool is_output);
    void check_grad(const std::vector<std::uint8_t>& before, bool backward) const;
    [[noreturn]] void wrong(const char* what, std::int64_t i, Real got, const Expected& e) const;
};

std::unique_ptr<Array> Case::add(Operand& operand, DType type, bool is_output) {
    Layout const layout =
        args.adjacent ? Layout{sizes, {1}} : any_layout(choices, sizes, !is_output);
    auto array = std::make_unique<Array>(choices, type, layout);
    if (!is_output) {
        Values values(choices);
        array->fill([&] { return values.next(); });
    }
    operand.data = array->data();
    std::copy(layout.strides.begin(), layout.strides.end(), operand.strides);
    return array;
}

Case::Case(Choices& choices_) : choices(choices_) {
    dtype = any_dtype(choices);
    computed = accumulate(dtype);
    args.kind = static_cast<Kind>(choices.between(0, static_cast<int>(Kind::weighted_bce)));
    args.adjacent = choices.one_in(2) && args.kind != Kind::weighted_bce;
    // Beyond the blocks of both walks.
    auto const most = choices.one_of<std::int64_t>({200, 200, 2500});
    auto const dims = args.adjacent ? 1 : choices.one_in(16) ? kMaxDims : choices.between(1, 3);
    numel = 1;
    for (std::int64_t d = 0; d < dims; ++d) {
        sizes.push_back(any_size(choices, std::max<std::int64_t>(most / numel, 1)));
        numel *= sizes.back();
    }
    args.numel = numel;
    args.dims = static_cast<int>(dims);
    std::copy(sizes.begin(), sizes.end(), args.sizes);
    args.dtype = dtype;
    args.target_dtype = choices.one_in(4) ? computed : dtype;
    args.weight_dtype = choices.one_in(4) ? computed : dtype;
    args.pos_weight_dtype = choices.one_in(4) ? computed : dtype;
    args.loss_dtype = choices.one_in(2) ? computed : dtype;
    args.parameter = choices.one_of({1.0, 0.1, 1e-18, 1e18, 3.0});
    divisor = choices.one_of({1.0, static_cast<double>(numel), 1e18});
    args.derivative_scale =
        fusedstep::pointwise_loss::derivative_scale(args.kind, args.parameter, divisor, dtype);

    input = add(args.input, dtype, false);
    target = add(args.target, args.target_dtype, false);
    if (!args.adjacent && !is_of_difference(args.kind) && choices.one_in(2)) {
        weight = add(args.weight, args.weight_dtype, false);
    }
    if (args.kind == Kind::weighted_bce)
        pos_weight = add(args.pos_weight, args.pos_weight_dtype, false);
    if (!choices.one_in(4)) grad = add(args.grad, dtype, true);
    if (choices.one_in(2)) loss = add(args.loss, args.loss_dtype, true);
    if (choices.one_in(2)) {
        args.grad_output_dtype = choices.one_in(2) ? computed : args.loss_dtype;
        bool const one_value = choices.one_in(2);
        Layout layout = any_layout(choices, sizes, true);
        if (one_value) layout.strides.assign(sizes.size(), 0);
        grad_output = std::make_unique<Array>(choices, args.grad_output_dtype, layout);
        Values values(choices);
        grad_output->fill([&] { return values.next(); });
        args.grad_output.data = grad_output->data();
        std::copy(layout.strides.begin(), layout.strides.end(), args.grad_output.strides);
    }
    for (std::int64_t i = 0; i < numel; ++i) {
        Real const parameter = pos_weight ? (*pos_weight)[i] : rounded(computed, args.parameter);
        Point p = point(args.kind, computed, (*input)[i], (*target)[i], parameter);
        if (weight) {
            p.loss = times(p.loss, (*weight)[i], computed);
            p.derivative = times(p.derivative, (*weight)[i], computed);
        }
        expected.push_back(p);
    }
}

void Case::wrong(const char* what, std::int64_t i, Real got, const Expected& e) const {
    fail(text(what, " at ", level, ", element ", i, ": ", got, " instead of ", e.value,
              " (magnitude ", e.magnitude, ", absolute ", e.absolute, ", largest ", e.largest,
              ")\n  input ", (*input)[i], ", target ", (*target)[i], ", weight ",
              weight ? (*weight)[i] : 1, ", pos_weight ", pos_weight ? (*pos_weight)[i] : 1,
              ", grad_output ", grad_output ? (*grad_output)[i] : 1, "\n  kind ", int(args.kind),
              " parameter ", args.parameter, ", dtype ", int(dtype), ", target's ",
              int(args.target_dtype), ", sizes ", list(sizes), ", adjacent ", args.adjacent,
              ", divisor ", divisor));
}

void Case::check_grad(const std::vector<std::uint8_t>& before, bool backward) const {
    for (std::int64_t i = 0; i < numel; ++i) {
        Real const upstream = backward ? (*grad_output)[i] : 1;
        Expected e =
            times(expected[static_cast<std::size_t>(i)].derivative, upstream / divisor, computed);
        // Of three factors two may underflow before they meet the third.
        e.absolute += e.largest + absolute(upstream);
        if (!is_close((*grad)[i], e, computed, dtype)) {
            wrong(backward ? "backward's gradient" : "gradient", i, (*grad)[i], e);
        }
    }
    grad->expect_gaps_untouched(before);
}

void Case::check(const CpuKernels& kernels) {
    std::int64_t const chunk = choices.between(1, numel);
    std::vector<std::uint8_t> const input_before = input->bytes();
    std::vector<std::uint8_t> const grad_before = grad ? grad->bytes() : input_before;
    std::vector<std::uint8_t> const loss_before = loss ? loss->bytes() : input_before;
    std::vector<double> sums(static_cast<std::size_t>((numel + chunk - 1) / chunk));
    in_chunks(choices, numel, chunk, [&](std::int64_t i, std::int64_t begin, std::int64_t end) {
        sums[static_cast<std::size_t>(i)] = kernels.forward(args, begin, end);
    });

    Real got = 0;
    for (double sum : sums) got += sum;
    Expected total{0, 0};
    for (std::int64_t i = 0; i < numel; ++i) {
        const Expected& e = expected[static_cast<std::size_t>(i)].loss;
        total.value += e.value;
        total.magnitude += e.magnitude;
        total.absolute += e.absolute;
        total.largest = std::max(total.largest, e.largest);
        if (loss && !is_close((*loss)[i], e, computed, args.loss_dtype)) {
            wrong("loss", i, (*loss)[i], e);
        }
    }
    if (loss) {
        if (got != 0) wrong("sum of losses beside a loss of each element", 0, got, {0, 0});
        loss->expect_gaps_untouched(loss_before);
        loss->restore(loss_before);
    } else if (!is_close(got, total, computed, DType::float64)) {
        wrong("sum of losses", 0, got, total);
    }
    if (grad) {
        check_grad(grad_before, false);
        grad->restore(grad_before);
    }
    if (grad && grad_output) {
        in_chunks(choices, numel, chunk, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
            kernels.backward(args, begin, end);
        });
        check_grad(grad_before, true);
        grad->restore(grad_before);
    }
    input->expect_unchanged(input_before);
}

}  // namespace
}  // namespace native

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    native::Choices choices(data, size);
    native::Case one(choices);
    for (const auto& level : NATIVE_LEVELS(pointwise_loss)) {
        one.level = level.name;
        one.check(level.kernels);
    }
    return 0;
}
