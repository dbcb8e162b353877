import pytest

from entropylens.sources.nnsight_parcel import unpack


def test_only_what_travels_is_found():
    sources = {"entropylens.a": "from entropylens import demo"}
    with pytest.raises(ImportError, match="not among the modules that travel"):
        unpack(sources)("entropylens.a", "anything")
