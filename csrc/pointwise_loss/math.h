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
//   bce_with_logits  (1 - t) x + softplus(-x)                           s - t
//   weighted_bce     (1 - t) x + (1 + (q - 1) t) softplus(-x)           (1 - t + q t) s - q t
//                    with q = pos_weight, s = sigmoid(x), softplus(-x) = max(-x, 0) + log(1 + e),
//                    e = exp(-|x|)
//
// These are the definitions that the torch.nn modules of the same names document; smooth_l1 is that
// of Girshick, 2015, huber that of Huber, 1964. bce_with_logits is the binary cross-entropy of s,
// multiplied out so that no exponential is taken of a positive number.
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
    weighted_bce = 5  // bce_with_logits where there is a pos_weight
};

// The derivative with respect to the target is minus that with respect to the input.
constexpr bool is_symmetric(Kind kind) {
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

// What a derivative below still has to be multiplied by: 2 d would overflow where d does not.
constexpr double derivative_factor(Kind kind) { return kind == Kind::mse ? 2 : 1; }

template <class V>
struct Point {
    V loss;
    V derivative;  // divided by derivative_factor()
};

// -1, 0 or 1; 0 for NaN, as in torch.
template <class V>
FUSEDSTEP_HD V sign(V d) {
    V const one = V{} + 1;
    return d > V{} ? one : (d < V{} ? -one : V{});
}

// What 1 + e is rounded by, for 0 <= e <= 1, is made good to first order where it would show:
// 1 + e = sum + lost, log(1 + e) = log(sum) + lost / sum.
template <class Math, class V>
struct OnePlus {
    V sum;
    V lost;
    V inverse;

    explicit FUSEDSTEP_HD OnePlus(V e) {
        V const one = V{} + 1;
        sum = one + e;
        lost = e - (sum - one);
        inverse = one / sum;
    }
    // What log(sum) lacks.
    FUSEDSTEP_HD V log_lost() const { return lost * inverse; }
    // numerator / (1 + e): a quotient, and its remainder's.
    FUSEDSTEP_HD V divide(V numerator) const {
        V const quotient = numerator * inverse;
        V const remainder = Math::fmadd(-quotient, sum, numerator);
        return Math::fmadd(Math::fmadd(-quotient, lost, remainder), inverse, quotient);
    }
};

// Math::exp(x) for x <= 0, Math::log_plus(x, y) = log(x) + y for 1 <= x <= 2, Math::fmadd(a, b, c)
// = a b + c, rounded once where the processor can. `parameter` is smooth_l1's beta, huber's delta,
// or weighted_bce's pos_weight of this point.
template <Kind kind, class Math, class V>
FUSEDSTEP_HD Point<V> evaluate(V x, V t, V parameter) {
    V const zero{};
    if constexpr (!is_symmetric(kind)) {
        V const one = zero + 1;
        V const magnitude = x < zero ? -x : x;
        V const e = Math::exp(-magnitude);
        OnePlus<Math, V> const one_plus_e(e);
        V const lost = one_plus_e.log_lost();
        V const opposite = x < zero ? -x : zero;
        V const sigmoid = one_plus_e.divide(x < zero ? e : one);
        if constexpr (kind == Kind::bce_with_logits) {
            // The logarithm comes last, to be rounded with all the rest. For x < 0 the product and
            // -x add up to little, -t x: what is lost may show beside that, not beside x.
            V const rest =
                Math::fmadd(one - t, x, x < zero ? opposite : lost) + (x < zero ? lost : zero);
            return {Math::log_plus(one_plus_e.sum, rest), sigmoid - t};
        }
        V const softplus = Math::log_plus(one_plus_e.sum, lost + opposite);
        V const weighted = parameter * t;
        return {(one - t) * x + (one + (parameter - one) * t) * softplus,
                (one - t + weighted) * sigmoid - weighted};
    } else {
        V const d = x - t;
        V const magnitude = d < zero ? -d : d;
        if constexpr (kind == Kind::l1) return {magnitude, sign(d)};
        if constexpr (kind == Kind::mse) return {d * d, d};
        V const half = zero + 0.5f;
        if constexpr (kind == Kind::smooth_l1) {
            return {magnitude < parameter ? half * d * d / parameter : magnitude - half * parameter,
                    magnitude >= parameter ? sign(d) : d / parameter};
        }
        if constexpr (kind == Kind::huber) {
            return {
                magnitude <= parameter ? half * d * d : parameter * (magnitude - half * parameter),
                magnitude >= parameter ? parameter * sign(d) : d};
        }
    }
}

}  // namespace fusedstep::pointwise_loss
