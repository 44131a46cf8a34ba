// One step: what is to be done, collected and checked before any of it is done.
#pragma once

#include <c10/util/SmallVector.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "optim/torch/candidate.h"
#include "optim/torch/scaler.h"

namespace fusedstep::optim {

// A thread takes at least so many chunks: 32,768 elements, as in torch's own elementwise kernels.
inline constexpr std::int64_t kGrain = 32768 / kChunk;

// RuntimeError where the current stream of the device, if that is a CUDA device, is captured in a
// graph: replays make a parameter's new state, called `name`, again and again.
void refuse_capture(c10::Device device, const std::string& name);

class StepPlan {
public:
    StepPlan(Optimizer& optimizer, py::dict state, py::handle grad_scale, py::handle found_inf,
             const Extensions& extensions)
        : optimizer_(optimizer),
          state_(std::move(state)),
          grad_scale_(grad_scale, 1),
          found_inf_(found_inf, 0),
          extensions_(extensions) {}

    // Takes in the parameters of a group; returns those with a gradient that are not covered.
    py::list add_group(PyObject* group);

    // Takes in one parameter of a group, which has a gradient; returns whether it is covered. Its
    // place is that among the parameters of all groups.
    bool add_one(PyObject* group, const py::object& param, std::uint64_t place);

    // Whether there was an overflow, and nothing is to be done. As far as it is known here: it is,
    // at the price of waiting for the device, where a kernel alone could not do what is right, or
    // where torch is to update parameters too.
    bool overflowed(bool left_to_torch);

    // Where it is known, as it is behind overflowed(true).
    double grad_scale() const { return grad_scale_.value(); }

    // Takes all the memory that the step wants: what follows may fail no more, but for a launch.
    void prepare();

    void run();

private:
    // A gradient in another layout than its parameter: copied to its entry's in its turn.
    struct GradientCopy {
        std::size_t entry;
        at::Tensor from;
    };
    // To be set in a parameter's state.
    struct NewState {
        py::object param;
        PyObject* key;
        py::object value;
    };
    // The entries on one device.
    struct Share {
        explicit Share(c10::Device device) : device(device) {}

        c10::Device device;
        c10::SmallVector<Entry, 16> entries;
        c10::SmallVector<Tensors, 16> tensors;  // one per entry
        std::vector<EntryStorage> storages;     // one per entry, or none
        bool is_ordinary = true;                // all entries
        std::vector<GradientCopy> copies;
        std::int64_t chunks = 0;
        // In the device's memory, where it is a CUDA device: see Step and CudaUpdate.
        at::Tensor grad_scale;
        at::Tensor found_inf;
        at::Tensor table;
    };

    // Whether gradients are written, as far as is known here.
    bool unscales() const { return !(grad_scale_.is_known() && grad_scale_.value() == 1); }

    // Or why the kernels cover no parameter of the group.
    Covered<Options> add_options(PyObject* group);
    Covered<> add(const py::object& param, const Covered<Options>& options);
    Covered<> add_covered(const py::object& param, const Options& options);
    // What the state lacks, and copies of what the kernels cannot write.
    EntryStorage make_state(Candidate& candidate);
    void list(Candidate&& candidate, const EntryStorage& storage);
    // Borrowed; null where there is none.
    PyObject* state_of(PyObject* param);
    Share& share_on(c10::Device device);
    // Whether entries share memory and would not be updated in their order.
    static bool any_overlap(const Share& share);
    // Where any do, makes a share of each entry: shares are run one after the other.
    void separate_overlapping();
    Step step_of(const Share& share) const;
    Step step_on_cuda(const Share& share) const;
    static void copy_gradients(const Share& share);
    void run_on_cpu(const Share& share) const;
    void prepare_on_cuda(Share& share) const;
    void run_on_cuda(const Share& share) const;

    Optimizer& optimizer_;
    py::dict state_;
    Py_ssize_t next_state_ = 0;  // for PyDict_Next()
    ScalerNumber grad_scale_;
    ScalerNumber found_inf_;
    const Extensions& extensions_;
    std::uint64_t place_ = 0;                     // of a parameter among those of all groups
    std::int32_t group_count_ = 0;                // of groups_
    c10::SmallVector<std::uint64_t, 16> groups_;  // the rule's Hyperparameters of each
    std::vector<at::Tensor> learning_rates_;      // on devices
    c10::SmallVector<Share, 1> shares_;
    std::vector<NewState> new_states_;
    std::vector<std::pair<c10::Device, NotCovered>> fell_back_;  // to be counted
    std::vector<at::Tensor> dtensors_;  // parameters whose local tensors are updated
    bool on_cpu_ = false;
    bool first_step_differs_ = false;  // of any entry: see the rule's
};

}  // namespace fusedstep::optim
