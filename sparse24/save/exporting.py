"""export: weights to files that others can read, and the way back from the compressed form.

format="safetensors"  the model's state_dict: the *dense master weights*, which are not sparse. With masked=True: the
                      weights that the sparse phase multiplies with, zeros written out, checked to be 2:4
format="compressed"   sparse weights as values and logical positions, about 9/16 of the size of 16-bit weights. It does
                      not depend on the order of metadata of any GPU. `load_compressed` reads it
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..convert import plain_name, sparse_layers, unwrap
from ..errors import Sparse24Error, Sparse24FileError, Sparse24MissingFileError, Sparse24Warning
from ..files import parse_json, write_atomically
from ..layers import DENSE, SparseLayer, mask_of, packing, state_of
from ..layers.fused.sparse_activation import activation_blocks
from ..layers.parallel import sharding, tensor_parallel
from ..layers.state import SOFT
from ..layers.watch.copies import fingerprint_of
from ..options import checked_options

FORMATS = ("safetensors", "compressed")
VERSION = 1
HEADER, DIGEST = "sparse24", "sparse24.sha256"  # keys in the metadata of the safetensors file


class Exported(NamedTuple):
    """What a file holds: a state_dict, zeros written out, and whether sparse weights in it are masked.

    fingerprints  layer -> phase and mask (`SparseLayer.fingerprint`) under which a plain file's weights were trained
    pruned        blocks whose activation was pruned; None if the file does not say
    """

    weights: dict[str, Tensor]
    masked: bool
    fingerprints: dict[str, str]
    pruned: list[str] | None = None


@checked_options()
@torch.no_grad()
def export(model: nn.Module, path: str | os.PathLike, format: str = "safetensors", masked: bool = False) -> None:
    """Write the weights of `model` to `path`, whole or not at all.

    format  "safetensors" or "compressed", see the module's docstring; compressed is masked by nature
    masked  write weight * mask for the sparse layers and check that it is 2:4. In the dense phase masks are not what
            the model computes with: they are then searched from the current weights, and a warning says so

    Raises Sparse24Error for an unknown format, a model without sparse layers where masks are asked for, and weights
    that are not 2:4 under their masks; Sparse24FileError (an OSError) where the file cannot be written.
    """
    if format not in FORMATS:
        raise Sparse24Error(
            f"format must be one of {', '.join(FORMATS)}, got {format!r}; for PyTorch's SparseSemiStructuredTensor "
            "there is sparse24.to_semi_structured(model)"
        )
    masked = masked or format == "compressed"
    layers = sparse_layers(model)
    if masked and not layers:
        raise Sparse24Error(
            f"{type(model).__name__} has no sparse layers, so there are no masks to apply; export it plain"
        )
    if masked:
        warn_of_dense_phase(layers, "exporting")
    state = plain_state(model)  # first: it gives sharded modules their master weights back
    header = {"version": VERSION, "format": format, "masked": masked, "layers": {}, "same": {}}
    header["pruned"] = [plain_name(name) for name in activation_blocks(unwrap(model))]
    if not masked:  # masked weights are their own masks
        whole = {name: layer for name, layer in layers.items() if state_of(layer).cut is None}
        header["fingerprints"] = {name: fingerprint_of(layer) for name, layer in whole.items()}
    for name, layer in layers.items() if masked else ():
        key, weight = weight_key(name), masked_weight(name, layer).cpu()  # a GPU has room for one at a time
        transposed = layer.as_kernel_sees(layer.weight) is not layer.weight
        if format == "safetensors":
            state[key] = weight.t() if transposed else weight
            continue
        del state[key]
        state[f"{key}.values"], state[f"{key}.positions"] = _pack_positions(weight)
        rows, cols = weight.shape
        header["layers"][key] = {"rows": rows, "cols": cols, "transposed": transposed}
    _save(state, header, path)


@torch.no_grad()
def load_compressed(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state_dict, masked weights written out, of a file that `export(format="compressed")` made; on the CPU.

    Raises Sparse24Error for another kind of file, another version, a file that is not as it was written, sizes that do
    not fit and positions that are not two rising ones a group. A missing file is a FileNotFoundError too, one that
    cannot be read an OSError.
    """
    state, header = _read(path)
    if header.get("format") != "compressed" or not isinstance(header.get("layers"), dict):
        raise Sparse24Error(f"{path} is not a compressed sparse24 file; read plain ones with safetensors itself")
    return _unpack(state, header, path)


@torch.no_grad()
def load_exported(path: str | os.PathLike) -> Exported:
    """What any file that `export` made holds, zeros written out. Raises as `load_compressed`.

    A safetensors file that somebody else made counts as a plain one.
    """
    state, header = _read(path)
    fingerprints = header.get("fingerprints", {})
    if not isinstance(fingerprints, dict):
        raise Sparse24Error(f"the header of {path} is corrupt: fingerprints must be an object")
    pruned = header.get("pruned")
    if not (pruned is None or isinstance(pruned, list) and all(isinstance(name, str) for name in pruned)):
        raise Sparse24Error(f"the header of {path} is corrupt: pruned must be a list of names")
    return Exported(_unpack(state, header, path), bool(header.get("masked", False)), fingerprints, pruned)


def _read(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a safetensors file, and its sparse24 header ({} without one), both as they were written."""
    from safetensors import safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}
    except FileNotFoundError as error:
        raise Sparse24MissingFileError(
            f"there is no file {os.path.abspath(path)}; sparse24.export(model, path) writes one, and a path is "
            "relative to the folder that the program runs in"
        ) from error
    except OSError as error:
        raise Sparse24FileError(f"{path} cannot be read ({error}); it must be a file that you may read") from error
    except Exception as error:  # a damaged header may be no UTF-8, or name a dtype that torch does not have
        raise Sparse24Error(f"{path} is not a whole safetensors file: {error}") from error
    header = parse_json(metadata.get(HEADER, "{}"), f"the header of {path}")
    version, digest = header.get("version"), metadata.get(DIGEST)
    if header and (type(version) is not int or version != VERSION):
        raise Sparse24Error(f"{path} has version {version!r}, this sparse24 reads {VERSION}")
    if digest is not None and digest != _digest(state, metadata.get(HEADER, "")):  # older files have none
        raise Sparse24Error(f"{path} is not the file that was written: it was damaged; restore it from a copy")
    return state, header


def _digest(tensors: dict[str, Tensor], header: str) -> str:
    """SHA-256 of the header and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        if tensor.numel():
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _unpack(state: dict[str, Tensor], header: dict, path: str | os.PathLike) -> dict[str, Tensor]:
    """The state_dict that was exported. The header is checked before it is used: anybody may have made the file."""
    layers, same = header.get("layers", {}), header.get("same", {})
    if not isinstance(layers, dict) or not isinstance(same, dict):
        raise Sparse24Error(f"the header of {path} is corrupt: layers and same must be objects")
    for key, shape in layers.items():
        values, positions = state.pop(f"{key}.values", None), state.pop(f"{key}.positions", None)
        if values is None or positions is None:
            raise Sparse24Error(f"{path} lacks the values or positions of {key}")
        rows, cols, transposed = _checked_shape(shape, key, path)
        weight = _unpack_positions(values, positions, rows, cols, key)
        state[key] = weight.t().contiguous() if transposed else weight
    for name, kept in same.items():
        if not isinstance(kept, str) or kept not in state:
            raise Sparse24Error(f"the header of {path} is corrupt: {name} is to be {kept!r}, which is not in the file")
        state[name] = state[kept]
    return state


def _checked_shape(shape: dict, key: str, path: str | os.PathLike) -> tuple[int, int, bool]:
    """(rows, cols, transposed) as the header has them for a layer."""
    fields = [shape.get(field) for field in ("rows", "cols", "transposed")] if isinstance(shape, dict) else []
    if [type(field) for field in fields] != [int, int, bool] or min(fields[:2]) < 0:
        raise Sparse24Error(f"the header of {path} is corrupt: {key} has the shape {shape!r}")
    return tuple(fields)


def weight_key(layer: str) -> str:
    """The key in a state_dict of the weight of the layer of this name; "" is the model itself."""
    return f"{layer}.weight" if layer else "weight"


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict under the names of the dense, unwrapped model; what FSDP2 has sharded is gathered to the CPU."""
    sharding.reshard(sharding.sharded_modules(model))
    state = unwrap(model).state_dict()
    return {plain_name(name): t.full_tensor().cpu() if packing.is_dtensor(t) else t for name, t in state.items()}


def warn_of_dense_phase(layers: dict[str, SparseLayer], doing: str) -> None:
    """Warn where masked weights are asked of a model that does not multiply with them."""
    if any(state_of(layer).phase == DENSE for layer in layers.values()):
        warnings.warn(
            f"{doing} masked weights of a model in its dense phase: it does not compute with these weights; train "
            "with dense_fraction=0 for a 2:4 model",
            Sparse24Warning,
            stacklevel=5,
        )


def masked_weight(name: str, layer: SparseLayer) -> Tensor:
    """weight * mask, [out_features, in_features], known to be 2:4; Sparse24Error, naming the layer, if it is not."""
    weight = packing.full_weight(layer)
    if layer._buffers[SOFT] is not None:
        out = layer._buffers[SOFT].clone()
    else:
        bits = ops.transposable_mask(weight) if state_of(layer).phase == DENSE else packing.mask_bits(mask_of(layer))
        out = torch.where(ops.unpack_mask(bits), weight, 0)
    kept = int((out.unflatten(-1, (-1, 4)) != 0).sum(-1).max())
    if kept > 2:
        raise Sparse24Error(f"{name} keeps {kept} of 4 weights under its mask; run sparse24.verify(model)")
    return tensor_parallel.whole(layer, out)


def _pack_positions(weight: Tensor) -> tuple[Tensor, Tensor]:
    """2:4 [rows, cols] -> values [rows, cols/2] and positions uint8 [rows, ceil(cols/8)].

    A group of four has a nibble, first position | second position << 2, rising; an even group's nibble is the low one.
    """
    groups = weight.unflatten(-1, (-1, 4))
    # The two that are not zero, filled up with the first zeros; a stable sort keeps them in order of position.
    order = (groups == 0).to(torch.uint8).argsort(dim=-1, stable=True)[..., :2].sort(dim=-1).values
    values = groups.gather(-1, order).flatten(-2).contiguous()
    nibbles = (order[..., 0] | (order[..., 1] << 2)).to(torch.uint8)
    if nibbles.shape[-1] % 2:
        nibbles = nn.functional.pad(nibbles, (0, 1), value=0b0100)
    return values, (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).contiguous()


def _unpack_positions(values: Tensor, positions: Tensor, rows: int, cols: int, key: str) -> Tensor:
    shapes = (tuple(values.shape), tuple(positions.shape), positions.dtype)
    if cols % 4 or shapes != ((rows, cols // 2), (rows, -(-cols // 8)), torch.uint8):
        raise Sparse24Error(f"values and positions of {key} do not fit a {rows} x {cols} weight: {shapes}")
    nibbles = torch.stack([positions & 0xF, positions >> 4], dim=-1).flatten(-2)[:, : cols // 4]
    order = torch.stack([nibbles & 3, nibbles >> 2], dim=-1).long()
    if not bool((order[..., 0] < order[..., 1]).all()):
        raise Sparse24Error(f"positions of {key} are corrupt: a group does not hold two rising positions")
    groups = values.new_zeros(rows, cols // 4, 4)
    return groups.scatter_(-1, order, values.unflatten(-1, (-1, 2))).flatten(-2)


def _save(state: dict[str, Tensor], header: dict, path: str | os.PathLike) -> None:
    """safetensors stores each tensor once; names of tied weights are noted in the header and given back on loading."""
    from safetensors.torch import save_file

    tensors, first = {}, {}
    for name, tensor in state.items():
        tensor = tensor.detach()
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            header["same"][name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor.contiguous().cpu()
    # Views into one storage, such as halves of a buffer, are not the same tensor: each gets memory of its own.
    tensors = {name: t.clone() if t.untyped_storage().nbytes() != t.nbytes else t for name, t in tensors.items()}
    text = json.dumps(header)
    metadata = {"format": "pt", HEADER: text, DIGEST: _digest(tensors, text)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
