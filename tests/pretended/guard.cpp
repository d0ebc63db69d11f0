// A device guard for CUDA that does nothing. CUDA builds of torch have one for machines
// without a device; CPU builds need it before tensors may say that they are on CUDA.
#include <c10/core/impl/DeviceGuardImplInterface.h>

static c10::impl::DeviceGuardImplRegistrar registered(
    c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
