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
    Real max = 0, exp_sum = 0, log_sum = 0, target_sum = 0, target_size = 0;
    bool ignored = false;
    Expected loss{0, 0}, lse{0, 0};
    // Of the gradient softmax p_c - u_c: U and u_y, or what other losses have in their place.
    Expected softmax{0, 0}, truth{0, 0};
    // Of focal loss: what both are wrong by, together, because 1 - p is.
    Real focal_error = 0;
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
    std::unique_ptr<Array> logits, probability, weight, grad, losses, stats, lse, grad_output;
    bool grad_in_forward = false;
    std::unique_ptr<Guarded> target;
    std::vector<Row> expected;
    Real weight_size = 0;  // of all classes in float64: a double must hold their sum
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
    void make_focal(Row& row, std::int64_t y, Real weight) const;
    void add_z_loss(Row& row, Real weight) const;
    Expected expected_grad(const Row& row, std::int64_t c, Real upstream) const;
    void check_scan(const CpuKernels& kernels);
    void check_stats() const;
    void check_grad(const std::vector<std::uint8_t>& before, bool backward) const;
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
    if (choices.one_in(2)) {
        lse = std::make_unique<Array>(choices, computed, rows);
        args.row_lse = lse->data();
    }
    // backward also serves a forward pass that wrote no gradient.
    grad_in_forward = grad && !(stats && choices.one_in(2));
    if (choices.one_in(2)) {
        if (args.target_kind == TargetKind::index) {
            args.variant.gamma = choices.one_of({0.0, 0.5, 1.0, 2.0, 5.0, 1e-3, 1e3});
        }
        if (args.variant.gamma == 0 || choices.one_in(4)) {
            args.variant.z_loss = choices.one_of({1e-4, 1.0, 1e-30, 1e30});
        }
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
        if (computed == DType::float64) weight_size += std::fabs((*weight)[c]);
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
    r.max = m;
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
    Real const log_sum = r.log_sum = std::log(r.exp_sum);
    r.loss.value = r.target_sum * log_sum - dot;
    r.loss.largest = weight_size;
    r.loss.magnitude = r.target_size * (1 + log_sum) + dot_size;
    // A product with a weight of a true class may underflow before it meets x_c - m.
    r.loss.absolute = log_sum + 1;
    for (Real shifted : r.shifted) {
        if (std::isfinite(shifted)) r.loss.absolute += std::fabs(shifted);
    }
    r.lse = {m + log_sum, std::fabs(m) + log_sum + 1};
    r.softmax = {r.target_sum, r.target_size};
    Real row_weight = 1;
    if (target) {
        std::int64_t const y = indices()[row];
        if (weight) row_weight = (*weight)[y];
        r.truth = times({1 - smoothing, 1}, row_weight, computed);
        if (args.variant.gamma != 0) make_focal(r, y, row_weight);
    }
    if (args.variant.z_loss != 0) add_z_loss(r, row_weight);
    return r;
}

// Both numbers of focal loss are functions of q = 1 - p, which the kernels know to some roundings
// of 1, and of log p, which they know as well as log(1 - q) where p is near 1.
void Case::make_focal(Row& r, std::int64_t index, Real w) const {
    auto const y = static_cast<std::size_t>(index);
    Real const gamma = rounded(computed, args.variant.gamma);
    Real const error = kRoundings * precision(computed).epsilon;
    Real others = 0;
    for (std::size_t c = 0; c < r.e.size(); ++c) {
        if (c != y) others += r.e[c];
    }
    struct Focal {
        Real loss, truth;
    };
    auto const focal = [&](Real q, Real p, Real minus_log_p) {
        Real const power = std::pow(q, gamma);
        Real const ratio = q == 0 ? 1 : p == 0 ? 0 : p * minus_log_p / q;
        return Focal{power * minus_log_p, power * (1 + gamma * ratio)};
    };
    Real const q = others / r.exp_sum, p = r.e[y] / r.exp_sum,
               minus_log_p = r.log_sum - r.shifted[y];
    Focal const exact = focal(q, p, minus_log_p);
    Real loss_error = 0, truth_error = 0;
    for (Real near : {std::max(q - error, Real{0}), std::min(q + error, Real{1})}) {
        Focal const f =
            q < 0.25 ? focal(near, 1 - near, -std::log1p(-near)) : focal(near, p, minus_log_p);
        if (std::isfinite(exact.loss)) {
            loss_error = std::max(loss_error, std::fabs(f.loss - exact.loss));
        }
        truth_error = std::max(truth_error, std::fabs(f.truth - exact.truth));
    }
    Real const power_size = 1 + (q > 0 ? std::fabs(gamma * std::log(q)) : 0);
    Real const log_p_size = std::isfinite(minus_log_p) ? minus_log_p : 0;
    r.loss =
        times({exact.loss, exact.loss * power_size + loss_error / error, log_p_size}, w, computed);
    r.loss.absolute += log_p_size;  // the weight meets the power first
    r.truth = times({exact.truth, exact.truth * power_size, 1 + gamma}, w, computed);
    r.truth.absolute += 1 + gamma;
    r.truth.largest = std::max(r.truth.largest, std::fabs(w) * (1 + gamma));
    r.softmax = r.truth;
    r.focal_error = std::fabs(w) * truth_error;
    r.u[y] = r.truth.value;
    r.u_size[y] = r.truth.magnitude;
}

void Case::add_z_loss(Row& r, Real w) const {
    Real const factor = rounded(computed, args.variant.z_loss) * w;
    Expected slope = times(r.lse, factor, computed);
    slope.absolute += r.lse.magnitude;
    slope.largest = std::max(slope.largest, std::fabs(w));
    auto const add = [](Expected& sum, Real value, Real magnitude, Real absolute) {
        sum.value += value;
        sum.magnitude += magnitude;
        sum.absolute += absolute;
        sum.largest = std::max({sum.largest, sum.magnitude});
    };
    Real const size = r.lse.magnitude;
    add(r.loss, slope.value * r.lse.value, slope.magnitude * size, slope.absolute * size);
    add(r.softmax, 2 * slope.value, 2 * slope.magnitude, 2 * slope.absolute);
    for (Expected* sum : {&r.loss, &r.softmax}) {
        sum->largest = std::max({sum->largest, slope.largest, slope.magnitude});
    }
    r.softmax.any_sign |= slope.any_sign;
}

Expected Case::expected_grad(const Row& row, std::int64_t i, Real upstream) const {
    if (row.ignored) return {0, 0};
    auto const c = static_cast<std::size_t>(i);
    bool const is_true_class = target && i == indices()[&row - expected.data()];
    Expected const scale = times(times(row.softmax, 1 / row.exp_sum, computed), upstream, computed);
    Real const spread = 1 + (row.e[c] > 0 ? std::fabs(row.shifted[c]) : 0) + row.log_sum;
    Expected g{};
    g.value = row.e[c] * scale.value - row.u[c] * upstream;
    g.magnitude = row.e[c] * scale.magnitude * spread + std::fabs(row.u_size[c] * upstream);
    if (row.focal_error > 0) {
        Real const share = std::fabs(row.e[c] / row.exp_sum - is_true_class);
        g.magnitude += share * row.focal_error * std::fabs(upstream) /
                       (kRoundings * precision(computed).epsilon);
    }
    g.absolute = std::fabs(upstream) * (2 + row.softmax.absolute + row.truth.absolute) +
                 scale.magnitude + row.softmax.magnitude;
    g.largest = std::max({scale.largest, scale.magnitude, row.softmax.magnitude, row.truth.largest,
                          weight_size, std::fabs(upstream)});
    g.any_sign = scale.any_sign;
    return g;
}

void Case::wrong(const char* what, std::int64_t row, std::int64_t c, Real got,
                 const Expected& e) const {
    fail(text(what, " at ", level, ", row ", row, " class ", c, ": ", got, " instead of ", e.value,
              " (magnitude ", e.magnitude, ", absolute ", e.absolute, ")\n  dtype ", int(dtype),
              ", rows ", list(row_sizes), ", classes ", classes, ", logits strides ",
              list(logits->layout().strides), ", target kind ", int(args.target_kind), " dtype ",
              int(args.target_dtype), ", weight ", bool(weight), ", smoothing ",
              args.label_smoothing, ", gamma ", args.variant.gamma, ", z-loss ",
              args.variant.z_loss, ", gradient scale ", args.gradient_scale, ", grad strides ",
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

void Case::check_stats() const {
    for (std::int64_t row = 0; row < rows; ++row) {
        const Row& r = expected[static_cast<std::size_t>(row)];
        if (lse) {
            Real const got = (*lse)[row];
            bool const right = r.ignored ? got == 0 : is_close(got, r.lse, computed, computed);
            if (!right) wrong("log-sum-exp", row, 0, got, r.lse);
        }
        if (!stats) continue;
        Expected m{r.max, 0}, scale{0, 0}, truth = r.truth;
        if (!r.ignored) {
            Real const focal_size = r.focal_error / (kRoundings * precision(computed).epsilon);
            scale = r.softmax;
            scale.magnitude += focal_size;
            truth.magnitude += focal_size;
            scale = times(scale, 1 / r.exp_sum, computed);
        }
        auto const expect_stat = [&](const char* what, std::int64_t at, const Expected& e) {
            Real const got = (*stats)[kRowStats * row + at];
            bool const right = r.ignored ? got == 0 : is_close(got, e, computed, computed);
            if (!right) wrong(what, row, 0, got, e);
        };
        // A row with NaN may have any maximum: what follows from it is NaN.
        if (!std::isnan(r.exp_sum)) expect_stat("maximum", 0, m);
        expect_stat("scale of exponentials", 1, scale);
        expect_stat("coefficient of the true class", 2, truth);
    }
    if (lse) lse->expect_gaps_untouched({});
    if (stats) stats->expect_gaps_untouched({});
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
    std::vector<std::pair<Array*, std::vector<std::uint8_t>>> of_rows;
    for (Array* array : {losses.get(), stats.get(), lse.get()}) {
        if (array) of_rows.emplace_back(array, array->bytes());
    }
    args.grad = grad_in_forward ? grad->data() : nullptr;
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
        total.any_sign |= loss.any_sign;
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
    check_stats();
    if (grad_in_forward) check_grad(grad_before, false);
    if (grad && stats) {
        grad->restore(grad_before);
        args.grad = grad->data();
        in_chunks(choices, rows, chunk, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
            kernels.backward(args, begin, end);
        });
        check_grad(grad_before, true);
    }
    if (grad) grad->restore(grad_before);
    for (auto& [array, before] : of_rows) array->restore(before);
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
