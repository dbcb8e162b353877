import numpy as np
import pytest
from gguf import GGUFWriter

from entropylens.errors import WeightsError
from entropylens.sources.gguf import check_gguf


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.ones((32, 64), dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_whole_file_passes(gguf):
    check_gguf(gguf)


@pytest.mark.parametrize("keep", [0, 3, 30, 200, 5000, -1])
def test_a_cut_file_does_not(gguf, keep):
    gguf.write_bytes(gguf.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"truncated|corrupt"):
        check_gguf(gguf)


def test_another_file_is_no_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" + b"\x00" * 500)
    with pytest.raises(WeightsError, match="corrupt"):
        check_gguf(path)
