import pytest
import torch
import transformers


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(2)
