// The kernels of cross_entropy/ on any contract, against the formula of its math.h.
#include "cross_entropy/cross_entropy.h"
#include "harness.h"

namespace native {
namespace {

using fusedstep::cross_entropy::Args;
using fusedstep::cross_entropy::CpuKernels;
using fusedstep::cross_entropy::kMaxRowDims;
using fusedstep::cross_entropy::kRowStats;
using fusedstep::cross_entropy::TargetKind;
using fusedstep::cross_entropy::TargetScan;

// One row: u_c, and what it is made of in absolute values; x_c - m; exp(x_c - m).
struct Row {
    std::vector<Real> u, u_size, shifted, e;
    Real exp_sum = 0, target_sum = 0, target_size = 0;
    bool ignored = false;
    Expected loss{0, 0};
};

struct Case {
    explicit Case(Choices& choices);

    void check(const CpuKernels& kernels);
    [[noreturn]] void wrong(const char* what, std::int64_t row, std::int64_t c, Real got,
                            const Expected& expected) const;

    Choices& choices;
    DType dtype, computed;
    std::int64_t rows, classes;
    std::vector<std::int64_t> row_sizes;
    Args args{};
    std::unique_ptr<Array> logits, probability, weight, grad, losses, stats, grad_output;
    std::unique_ptr<Guarded> target;
    std::vector<Row> expected;
    Real weight_size = 0;  // of all classes: their sum must not overflow with label smoothing
    const char* level = "";

private:
    std::vector<std::int64_t> with_classes() const {
        std::vector<std::int64_t> sizes = row_sizes;
        sizes.push_back(classes);
        return sizes;
    }
    void set_strides(const Array& array, std::int64_t* row_strides, std::int64_t& class_stride) {
        std::copy_n(array.layout().strides.begin(), row_sizes.size(), row_strides);
        class_stride = array.layout().strides.back();
    }
    std::int64_t* indices() const { return reinterpret_cast<std::int64_t*>(target->data()); }
    void draw_targets();
    Row expect(std::int64_t row) const;
    Expected expected_grad(const Row& row, std::int64_t c, Real upstream) const;
    void check_scan(const CpuKernels& kernels);
    void check_grad(const std::vector<std::uint8_t>& before, bool backward) const;
    double run(const CpuKernels& kernels, std::int64_t chunk);
};

Case::Case(Choices& choices_) : choices(choices_) {
    dtype = any_dtype(choices);
    computed = accumulate(dtype);
    // Borders of the walks: 112 classes, 4 rows; of blocks: 16 rows, 16 and 4096 classes.
    auto const most_logits = choices.one_of<std::int64_t>({200, 200, 200, 1500, 1500, 9000});
    classes = any_size(choices, most_logits);
    if (choices.one_in(8)) classes = choices.between(108, 116);
    rows = 1;
    auto const dims = choices.one_in(16) ? kMaxRowDims : choices.between(1, 3);
    for (std::int64_t d = 0; d < dims; ++d) {
        std::int64_t const most = std::clamp<std::int64_t>(most_logits / classes / rows, 1, 80);
        row_sizes.push_back(any_size(choices, most));
        rows *= row_sizes.back();
    }
    args.rows = rows;
    args.classes = classes;
    args.row_dims = static_cast<int>(dims);
    std::copy(row_sizes.begin(), row_sizes.end(), args.row_sizes);
    args.dtype = dtype;

    logits = std::make_unique<Array>(choices, dtype, any_layout(choices, with_classes(), true));
    Values values(choices);
    logits->fill([&] { return values.next(); });
    args.logits = logits->data();
    set_strides(*logits, args.logits_row_strides, args.logits_class_stride);

    if (choices.one_in(2)) {
        weight = std::make_unique<Array>(choices, computed, classes);
        Values weights(choices);
        bool const any_sign = choices.one_in(8);
        weight->fill([&] { return any_sign ? weights.next() : weights.not_negative(); });
        args.weight = weight->data();
    }
    draw_targets();

    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    args.gradient_scale =
        choices.one_of({1.0, 1.0 / static_cast<double>(rows), 1e-30, 1e30, 0.0, nan});
    if (!choices.one_in(4)) {
        grad = std::make_unique<Array>(choices, dtype, any_layout(choices, with_classes(), false));
        args.grad = grad->data();
        set_strides(*grad, args.grad_row_strides, args.grad_class_stride);
    }
    args.loss_dtype = choices.one_in(2) ? computed : dtype;
    if (choices.one_in(2)) {
        losses = std::make_unique<Array>(choices, args.loss_dtype, rows);
        args.row_losses = losses->data();
    }
    if (choices.one_in(2)) {
        stats = std::make_unique<Array>(choices, computed, kRowStats * rows);
        args.row_stats = stats->data();
        args.grad_output_stride = choices.between(0, 1);
        grad_output =
            std::make_unique<Array>(choices, computed, args.grad_output_stride == 0 ? 1 : rows);
        Values upstream(choices);
        grad_output->fill([&] { return upstream.next(); });
        args.grad_output = grad_output->data();
    }
    for (std::int64_t row = 0; row < rows; ++row) expected.push_back(expect(row));
}

void Case::draw_targets() {
    args.target_kind =
        choices.one_of({TargetKind::index, TargetKind::smoothed_index, TargetKind::probability});
    args.ignore_index = choices.one_of<std::int64_t>({-100, 0, classes - 1, classes, INT64_MIN});
    if (args.target_kind != TargetKind::index) {
        args.label_smoothing = choices.one_of({0.1, 1.0, 1e-6, 0.999});
    }
    if (args.target_kind == TargetKind::probability) {
        if (choices.one_in(2)) args.label_smoothing = 0;
        args.target_dtype = choices.one_in(2) ? dtype : computed;
        probability = std::make_unique<Array>(choices, args.target_dtype,
                                              any_layout(choices, with_classes(), true));
        Values values(choices);
        bool const any_sign = choices.one_in(8);
        probability->fill([&] { return any_sign ? values.next() : values.not_negative(); });
        args.target_probability = probability->data();
        set_strides(*probability, args.target_row_strides, args.target_class_stride);
    } else {
        target = std::make_unique<Guarded>(static_cast<std::size_t>(rows) * sizeof(std::int64_t),
                                           choices.between(0, 3) != 0);
        bool const some_ignored = choices.one_in(2);
        for (std::int64_t row = 0; row < rows; ++row) {
            bool const ignored = some_ignored && choices.random() % 4 == 0;
            auto const y =
                static_cast<std::int64_t>(choices.random() % static_cast<std::uint64_t>(classes));
            indices()[row] = ignored ? args.ignore_index : y;
        }
        args.target_index = indices();
    }
    Real sum = weight ? 0 : classes;
    for (std::int64_t c = 0; weight && c < classes; ++c) {
        sum += (*weight)[c];
        weight_size += std::fabs((*weight)[c]);
    }
    args.weight_sum = static_cast<double>(sum);
}

Row Case::expect(std::int64_t row) const {
    Row r;
    auto const n = static_cast<std::size_t>(classes);
    r.ignored = target && indices()[row] == args.ignore_index;
    if (r.ignored) return r;
    Real m = -std::numeric_limits<Real>::infinity();
    for (std::int64_t c = 0; c < classes; ++c) {
        Real const x = (*logits)[row * classes + c];
        if (x > m) m = x;
    }
    Real const smoothing = args.label_smoothing;
    Real const per_class = smoothing / classes;
    Real dot = 0, dot_size = 0;
    r.u.resize(n), r.u_size.resize(n), r.shifted.resize(n), r.e.resize(n);
    for (std::int64_t i = 0; i < classes; ++i) {
        auto const c = static_cast<std::size_t>(i);
        Real const w = weight ? (*weight)[i] : 1;
        r.shifted[c] = rounded(computed, (*logits)[row * classes + i] - m);
        r.e[c] = std::exp(r.shifted[c]);
        r.exp_sum += r.e[c];
        bool is_in_target = true;
        if (args.target_kind == TargetKind::probability) {
            Real const t = (*probability)[row * classes + i];
            r.u[c] = ((1 - smoothing) * t + per_class) * w;
            r.u_size[c] = std::fabs(((1 - smoothing) * std::fabs(t) + per_class) * w);
        } else {
            bool const is_true_class = i == indices()[row];
            if (args.target_kind == TargetKind::smoothed_index) r.u[c] = per_class * w;
            if (is_true_class) r.u[c] += (1 - smoothing) * w;
            r.u_size[c] = std::fabs(is_true_class ? w + per_class * w : r.u[c]);
            is_in_target = is_true_class || args.target_kind == TargetKind::smoothed_index;
        }
        if (!is_in_target) continue;
        r.target_sum += r.u[c];
        r.target_size += r.u_size[c];
        dot += r.u[c] * r.shifted[c];
        dot_size += std::fabs(r.u_size[c] * r.shifted[c]);
    }
    Real const log_sum = std::log(r.exp_sum);
    r.loss.value = r.target_sum * log_sum - dot;
    r.loss.largest = weight_size;
    r.loss.magnitude = r.target_size * (1 + log_sum) + dot_size;
    // A product with a weight of a true class may underflow before it meets x_c - m.
    r.loss.absolute = log_sum + 1;
    for (Real shifted : r.shifted) {
        if (std::isfinite(shifted)) r.loss.absolute += std::fabs(shifted);
    }
    return r;
}

Expected Case::expected_grad(const Row& row, std::int64_t i, Real upstream) const {
    if (row.ignored) return {0, 0};
    auto const c = static_cast<std::size_t>(i);
    Real const scale = row.target_sum / row.exp_sum * upstream;
    Real const size = std::fabs(row.target_size / row.exp_sum * upstream);
    Real const spread = 1 + (row.e[c] > 0 ? std::fabs(row.shifted[c]) : 0) + std::log(row.exp_sum);
    Expected g{};
    g.value = row.e[c] * scale - row.u[c] * upstream;
    g.magnitude = row.e[c] * size * spread + std::fabs(row.u_size[c] * upstream);
    g.absolute = std::fabs(upstream) * 2 + size + row.target_size;
    g.largest = std::max({size, row.target_size, weight_size, std::fabs(upstream)});
    return g;
}

void Case::wrong(const char* what, std::int64_t row, std::int64_t c, Real got,
                 const Expected& e) const {
    fail(text(what, " at ", level, ", row ", row, " class ", c, ": ", got, " instead of ", e.value,
              " (magnitude ", e.magnitude, ", absolute ", e.absolute, ")\n  dtype ", int(dtype),
              ", rows ", list(row_sizes), ", classes ", classes, ", logits strides ",
              list(logits->layout().strides), ", target kind ", int(args.target_kind), " dtype ",
              int(args.target_dtype), ", weight ", bool(weight), ", smoothing ",
              args.label_smoothing, ", gradient scale ", args.gradient_scale, ", grad strides ",
              list(grad ? grad->layout().strides : std::vector<std::int64_t>{})));
}

void Case::check_scan(const CpuKernels& kernels) {
    std::int64_t const chunk = choices.between(1, rows);
    std::vector<TargetScan> scans(static_cast<std::size_t>((rows + chunk - 1) / chunk));
    auto const scan = [&] {
        in_chunks(choices, rows, chunk, [&](std::int64_t i, std::int64_t begin, std::int64_t end) {
            scans[static_cast<std::size_t>(i)] = kernels.scan_targets(args, begin, end);
        });
    };
    scan();
    Expected sum{0, 0};
    Real got = 0;
    for (std::int64_t row = 0; row < rows; ++row) {
        if (expected[static_cast<std::size_t>(row)].ignored) continue;
        Real const w = weight ? (*weight)[indices()[row]] : 1;
        sum.value += w;
        sum.magnitude += std::fabs(w);
    }
    for (const TargetScan& s : scans) {
        got += s.weight_sum;
        if (s.first_invalid != -1) wrong("first_invalid", s.first_invalid, 0, 0, {-1, 0});
    }
    if (!is_close(got, sum, DType::float64, DType::float64)) wrong("weight_sum", 0, 0, got, sum);

    std::int64_t const row = choices.between(0, rows - 1);
    std::int64_t const before = indices()[row];
    indices()[row] = choices.one_of<std::int64_t>({-1, classes, INT64_MAX, INT64_MIN, -classes});
    if (indices()[row] != args.ignore_index) {
        scan();
        std::int64_t const found = scans[static_cast<std::size_t>(row / chunk)].first_invalid;
        if (found != row) wrong("first_invalid", row, 0, Real(found), {Real(row), 0});
    }
    indices()[row] = before;
}

void Case::check_grad(const std::vector<std::uint8_t>& before, bool backward) const {
    Real const scale = rounded(computed, args.gradient_scale);
    for (std::int64_t row = 0; row < rows; ++row) {
        const Row& r = expected[static_cast<std::size_t>(row)];
        Real const upstream =
            backward ? scale * (*grad_output)[row * args.grad_output_stride] : scale;
        for (std::int64_t c = 0; c < classes; ++c) {
            Real const got = (*grad)[row * classes + c];
            Expected const e = expected_grad(r, c, upstream);
            bool const right = r.ignored ? got == 0 : is_close(got, e, computed, dtype);
            if (!right) wrong(backward ? "backward's gradient" : "gradient", row, c, got, e);
        }
    }
    grad->expect_gaps_untouched(before);
}

void Case::check(const CpuKernels& kernels) {
    if (target) check_scan(kernels);
    std::int64_t const chunk = choices.one_in(2)
                                   ? fusedstep::cross_entropy::rows_per_chunk(rows, classes)
                                   : choices.between(1, rows);
    std::vector<std::uint8_t> const logits_before = logits->bytes();
    std::vector<std::uint8_t> const grad_before = grad ? grad->bytes() : logits_before;
    std::vector<double> sums(static_cast<std::size_t>((rows + chunk - 1) / chunk));
    in_chunks(choices, rows, chunk, [&](std::int64_t i, std::int64_t begin, std::int64_t end) {
        sums[static_cast<std::size_t>(i)] = kernels.forward(args, begin, end);
    });

    Expected total{0, 0};
    Real got_total = 0;
    for (double sum : sums) got_total += sum;
    for (std::int64_t row = 0; row < rows; ++row) {
        const Expected& loss = expected[static_cast<std::size_t>(row)].loss;
        total.value += loss.value;
        total.magnitude += loss.magnitude;
        total.absolute += loss.absolute;
        total.largest = std::max({total.largest, loss.largest, loss.magnitude});
        if (!losses) continue;
        Real const got = (*losses)[row];
        bool const ignored = expected[static_cast<std::size_t>(row)].ignored;
        if (ignored ? got != 0 : !is_close(got, loss, computed, args.loss_dtype)) {
            wrong("loss", row, 0, got, loss);
        }
    }
    if (losses) {
        if (got_total != 0) wrong("sum of losses beside row_losses", 0, 0, got_total, {0, 0});
        losses->expect_gaps_untouched({});
    } else if (!is_close(got_total, total, computed, DType::float64)) {
        wrong("sum of losses", 0, 0, got_total, total);
    }
    if (grad) check_grad(grad_before, false);
    if (grad && stats) {
        stats->expect_gaps_untouched({});
        grad->restore(grad_before);
        in_chunks(choices, rows, chunk, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
            kernels.backward(args, begin, end);
        });
        check_grad(grad_before, true);
        grad->restore(grad_before);
    }
    logits->expect_unchanged(logits_before);
}

}  // namespace
}  // namespace native

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    native::Choices choices(data, size);
    native::Case one(choices);
    for (const auto& level : NATIVE_LEVELS(cross_entropy)) {
        one.level = level.name;
        one.check(level.kernels);
    }
    return 0;
}
