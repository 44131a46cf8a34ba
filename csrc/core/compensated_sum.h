// A sum of many doubles whose rounding error does not grow with their number.
#pragma once

#include "core/dtype.h"

namespace fusedstep {

// Neumaier's variant of Kahan's summation (1974): the low part of every addition is kept apart.
class CompensatedSum {
public:
    FUSEDSTEP_HD void add(double x) {
        double const sum = sum_ + x;
        bool const sum_is_larger = (sum_ < 0 ? -sum_ : sum_) >= (x < 0 ? -x : x);
        low_ += sum_is_larger ? (sum_ - sum) + x : (x - sum) + sum_;
        sum_ = sum;
    }
    // What was infinite or NaN without compensation is so with it.
    FUSEDSTEP_HD double total() const {
        double const total = sum_ + low_;
        return total == total ? total : sum_;
    }

private:
    double sum_ = 0;
    double low_ = 0;
};

}  // namespace fusedstep
