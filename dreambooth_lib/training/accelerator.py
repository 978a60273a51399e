"""Join the processes that train one run together, each on its device and in one precision."""

from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import AutocastKwargs

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_checks import LOW_MEMORY
from dreambooth_lib.core.errors import InputError


def make_accelerator(config: TrainConfig, precision: str) -> Accelerator:
    """Join the processes that train together. Raises InputError where they cannot share a batch."""
    if is_initialized() and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # an earlier run's, in this process
    # Autocast's cached half-precision weights save time, but take memory.
    autocast = AutocastKwargs(cache_enabled=config.memory not in LOW_MEMORY)
    accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[autocast])
    processes, micro_batches = accelerator.num_processes, config.gradient_accumulation
    if config.steps_in_backward and processes > 1:
        raise InputError(
            f"memory is '{config.memory}', which updates weights during the backward pass, before "
            f"{processes} processes could average their gradients; set memory to 'standard'."
        )
    if config.batch_size % (processes * micro_batches):
        raise InputError(
            f"batch_size {config.batch_size} does not split into {processes * micro_batches} equal "
            f"parts ({processes} processes x gradient_accumulation {micro_batches}); make it a "
            "multiple."
        )
    return accelerator
