// The scalar mathematics of the pointwise losses, written once for the CPU (where V is a vector)
// and for CUDA (where V is a scalar): a value and its derivative with respect to the input, for one
// input x, one target t and d = x - t.
//
//   l1               |d|                                                sign(d)
//   mse              d^2                                                2 d
//   smooth_l1        d^2 / (2 beta)  where |d| < beta                   d / beta
//                    |d| - beta / 2  elsewhere                          sign(d)
//   huber            d^2 / 2                  where |d| <= delta        d
//                    delta (|d| - delta / 2)  elsewhere                 delta sign(d)
//   weighted_bce     (1 - t) x + m (log(1 + e) + max(-x, 0)), that is:
//                    m log(1 + e) + (1 - t) x  where x >= 0             (1 - t) - m s
//                    m log(1 + e) - q t x      elsewhere                m s - q t
//                    with q = pos_weight, m = 1 - t + q t, e = exp(-|x|), s = e / (1 + e)
//   bce_with_logits  that with q = 1, so m = 1
//
// These are the definitions that the torch.nn modules of the same names document; smooth_l1 is that
// of Girshick, 2015, huber that of Huber, 1964. A binary cross-entropy has two tails, in which the
// logit is on the target's side and what is left is about e: neither log(1 + e) nor s is ever added
// there to a number that is large beside it.
#pragma once

#include <type_traits>

#include "core/dtype.h"

namespace fusedstep::pointwise_loss {

enum class Kind : int {
    l1 = 0,
    mse = 1,
    smooth_l1 = 2,
    huber = 3,
    bce_with_logits = 4,
    weighted_bce = 5  // the last: bce_with_logits where there is a pos_weight
};

// Of x - t alone, so that the derivative with respect to the target is minus that with respect to
// the input.
constexpr bool is_of_difference(Kind kind) {
    return kind != Kind::bce_with_logits && kind != Kind::weighted_bce;
}

// Calls f(std::integral_constant<Kind, kind>{}).
template <class F>
FUSEDSTEP_HD decltype(auto) with_kind(Kind kind, F&& f) {
    switch (kind) {
        case Kind::l1:
            return f(std::integral_constant<Kind, Kind::l1>{});
        case Kind::mse:
            return f(std::integral_constant<Kind, Kind::mse>{});
        case Kind::smooth_l1:
            return f(std::integral_constant<Kind, Kind::smooth_l1>{});
        case Kind::huber:
            return f(std::integral_constant<Kind, Kind::huber>{});
        case Kind::bce_with_logits:
            return f(std::integral_constant<Kind, Kind::bce_with_logits>{});
        case Kind::weighted_bce:
            break;
    }
    return f(std::integral_constant<Kind, Kind::weighted_bce>{});
}

template <class V>
struct Point {
    V loss;
    V derivative;  // of mse divided by 2, of smooth_l1 times beta: see derivative_scale()
};

// 1 / divisor as the sum of two numbers, so that a product with it is rounded once, as a quotient
// is, at a fraction of the price.
template <class V>
struct Reciprocal {
    V high;
    V low;

    template <class Math>
    FUSEDSTEP_HD V times(V x) const {
        return Math::fmadd(x, high, x * low);
    }
};

// The gradient: a derivative of evaluate() times derivative_scale() times grad_output. Losses whose
// derivative may be as large or as small as d multiply the last two first: d times the scale could
// become infinite, or 0, where the gradient does not. For the others the product of derivative and
// scale is rounded once.
template <class Math, class V>
FUSEDSTEP_HD V gradient(Kind kind, V derivative, const Reciprocal<V>& scale, V grad_output) {
    bool const scale_first = kind == Kind::smooth_l1 || !is_of_difference(kind);
    return scale_first ? scale.template times<Math>(derivative) * grad_output
                       : derivative * ((scale.high + scale.low) * grad_output);
}

// -1, 0 or 1; 0 for NaN, as in torch.
template <class V>
FUSEDSTEP_HD V sign(V d) {
    V const one = V{} + 1;
    return d > V{} ? one : (d < V{} ? -one : V{});
}

// ((c_0 x + c_1) x + c_2) x + ...
template <class Math, class V, class First, class... Rest>
FUSEDSTEP_HD V polynomial(V x, First first, Rest... rest) {
    V value = V{} + first;
    ((value = Math::fmadd(value, x, V{} + rest)), ...);
    return value;
}

// (-log(1 - x) - x) / x^2 for 0 <= x <= 1/2: Remez fits, whose errors are 3.7e-9 (float) and
// 6.8e-18 (double) of the logarithm.
template <class Math, class V>
FUSEDSTEP_HD V log_tail(V x) {
    if constexpr (std::is_same_v<typename Math::template Number<V>, float>) {
        return polynomial<Math>(x, 1.7459201f, -2.4822767f, 1.9766792f, -0.59535468f, 0.34104520f,
                                0.17569007f, 0.25188858f, 0.33326215f, 0.50000092f);
    } else {
        return polynomial<Math>(
            x, 26.975983932568748442, -114.03834804904893257, 228.88219499102189577,
            -285.58814921664958836, 247.25368768654440253, -156.72234467880745648,
            75.303800899718005757, -27.755678962216718991, 8.0883631295941417657,
            -1.7183711507411007907, 0.40682639729536920142, 0.057111977617436969195,
            0.11556288893358580139, 0.12465336374276006939, 0.1428768366406614866,
            0.16666588228431437216, 0.20000002064008765205, 0.24999999967315585824,
            0.33333333333597545646, 0.49999999999999247732);
    }
}

// The losses below: Math::exp(x) for x <= 0 as a sum of two numbers, .high + .low, that has yet to
// be rounded; Math::fmadd(a, b, c) = a b + c, rounded once where the processor can;
// Math::Number<V>, what V holds.

// bce_with_logits, or weighted_bce with pos_weight q.
template <Kind kind, class Math, class V>
FUSEDSTEP_HD Point<V> binary_cross_entropy(V x, V t, V q) {
    V const zero{};
    V const one = zero + 1;
    // 1 + e = -(minus_sum + minus_lost); e / (1 + e) = sigmoid(-|x|) is a quotient and its
    // remainder's.
    auto const e = Math::exp(x < -x ? x : -x);
    V const rounded = e.high + e.low;
    V const minus_sum = -one - rounded;
    // Of so small an e the square adds nothing, but might be subnormal, which a processor may take
    // a hundred cycles for.
    using Number = typename Math::template Number<V>;
    constexpr double kSmall = std::is_same_v<Number, double> ? 0x1p-120 : 0x1p-58;
    auto const small = e.high < static_cast<Number>(kSmall);
    V const minus_lost = small ? zero : ((-one - minus_sum) - e.high) - e.low;
    V const inverse = -one / minus_sum;
    V const quotient = rounded * inverse;
    V const remainder =
        Math::fmadd(quotient, minus_lost, Math::fmadd(quotient, minus_sum, e.high) + e.low);
    V const sigmoid = Math::fmadd(remainder, inverse, quotient);
    // log(1 + e) = -log(1 - quotient) + remainder, to first order, = quotient + tail
    V const squared = small ? zero : quotient;
    V const tail = Math::fmadd(squared * squared, log_tail<Math>(quotient), remainder);
    V const log_sum = quotient + tail;
    V const signed_sigmoid = x < zero ? sigmoid : -sigmoid;
    if constexpr (kind == Kind::bce_with_logits) {
        V const base = x < zero ? zero : one;
        V const linear = base - t;
        // With what 1 - t was rounded by: NaN for an infinite target. The comparison replaces that
        // by a number (and is one instruction, as it would not be with a constant).
        V const rest = signed_sigmoid + ((base - linear) - t);
        return {log_sum + linear * x, linear + (rest > minus_sum ? rest : minus_sum)};
    }
    V const complement = one - t;
    // An infinite target gives what torch's formula gives, the one of softplus in the table above.
    V const nan_if_infinite = t - t;
    auto const finite = nan_if_infinite == zero;
    V const softplus = finite | (x >= zero) ? log_sum : log_sum - x;
    auto const negative = finite & (x < zero);
    // 1 - t + q t. The first form is exact, but for its last rounding, where the terms may cancel
    // between the bounds of t, the second where they may elsewhere (there q > 1/2, and q - 1 is
    // exact).
    auto const between = (t >= zero) & (t <= zero + 4);
    V const m = Math::fmadd(between ? q : q - one, t, between ? complement : one);
    // q t x in the order in which a finite result does not overflow on the way.
    V const weighted = (between ? q : x) * t * (between ? x : q);
    return {(negative ? -weighted : complement * x) + m * softplus,
            Math::fmadd(m, signed_sigmoid, negative ? -(q * t) : complement) + nan_if_infinite};
}

// The losses of d = x - t alone. parameter: smooth_l1's beta > 0 or huber's delta > 0.
template <Kind kind, class V>
FUSEDSTEP_HD Point<V> loss_of_difference(V d, V parameter) {
    V const zero{};
    V const magnitude = d < zero ? -d : d;
    if constexpr (kind == Kind::l1) return {magnitude, sign(d)};
    if constexpr (kind == Kind::mse) return {d * d, d};
    V const half = zero + 0.5f;
    if constexpr (kind == Kind::smooth_l1) {
        return {magnitude < parameter ? half * d * d / parameter : magnitude - half * parameter,
                magnitude >= parameter ? (d < zero ? -parameter : parameter) : d};
    }
    if constexpr (kind == Kind::huber) {
        return {magnitude <= parameter ? half * d * d : parameter * (magnitude - half * parameter),
                magnitude >= parameter ? (d < zero ? -parameter : parameter) : d};
    }
}

// A loss of one input x and one target t. parameter: beta, delta, or weighted_bce's pos_weight of
// this point.
template <Kind kind, class Math, class V>
FUSEDSTEP_HD Point<V> evaluate(V x, V t, V parameter) {
    if constexpr (is_of_difference(kind)) {
        return loss_of_difference<kind>(x - t, parameter);
    } else {
        return binary_cross_entropy<kind, Math>(x, t, parameter);
    }
}

}  // namespace fusedstep::pointwise_loss
