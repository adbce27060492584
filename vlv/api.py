"""The public API: `from vlv import Captioner, Autoencoder, load_config`.

`Captioner` and `Autoencoder` take images as paths, Pillow images or arrays. They wrap the modules of `vlv.models`,
which take tensors; the attribute `model` is that module. Torch is imported when a model is loaded.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlv import config
from vlv.config import Config, ConfigError, Paths
from vlv.io import files

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from vlv.io.images import Pixels
    from vlv.models import autoencoder, captioner

    Picture = str | Path | Image.Image | Pixels


class Captioner:
    """A trained captioner: it writes one caption for each image.

    Examples:
        >>> from vlv import Captioner
        >>> captioner = Captioner.from_pretrained("work/stage2/model")
        >>> captioner.caption(["photo.jpg", "photo.png"])
        ['...', '...']
    """

    def __init__(self, model: "captioner.Captioner") -> None:
        self.model = model

    @classmethod
    def from_pretrained(cls, source: str | Path | None = None, device: str | None = None) -> "Captioner":
        """Load a captioner.

        Args:
            source: a model folder that Stage 2 wrote, or a registered version (`models:/NAME@ALIAS`,
                `models:/NAME/VERSION`). None: the project's champion, or the newest training if there is none.
            device: such as "cpu" or "cuda:1". None: the accelerator if there is one, otherwise the CPU.

        Raises:
            ModelFolderError: not a captioner, wrong tensors, or other pretrained parts than in its training.
            RegistryError: no such version, or MLflow does not answer.
        """
        from vlv.models.captioner import Captioner as Model

        folder, paths = _located(source, "stage2")
        return cls(Model.load(folder, paths).to(_device(device)))

    def caption(self, images: "Sequence[Picture]", batch_size: int = 16) -> list[str]:
        """Caption images with the saved model's settings (`language_model.generation`).

        Args:
            images: paths, Pillow images, or arrays (H, W, 3) uint8 with RGB in 0..255; of any size.
            batch_size: images that are captioned together.

        Returns:
            One caption for each image, in the same order.

        Raises:
            ImageError: a file that is not a readable image; the message names it.
        """
        return self.model.caption(_pixels(images), batch_size)


class Autoencoder:
    """A trained auto-encoder of Stage 1: images to caption embeddings, and from these to images.

    Examples:
        >>> from vlv import Autoencoder
        >>> autoencoder = Autoencoder.from_pretrained("work/stage1/model")
        >>> autoencoder.embed(["photo.jpg"]).shape  # images, queries, width of an embedding
        torch.Size([1, ..., 128])
        >>> autoencoder.reconstruct(["photo.jpg"], steps=2)[0].size
        (64, 64)
    """

    def __init__(self, model: "autoencoder.Autoencoder") -> None:
        self.model = model

    @classmethod
    def from_pretrained(cls, source: str | Path | None = None, device: str | None = None) -> "Autoencoder":
        """Load an auto-encoder. Arguments and errors are those of `Captioner.from_pretrained`, for Stage 1."""
        from vlv.models.autoencoder import Autoencoder as Model

        folder, paths = _located(source, "stage1")
        return cls(Model.load(folder, paths).to(_device(device)))

    def embed(self, images: "Sequence[Picture]", batch_size: int = 16) -> "torch.Tensor":
        """Compute the caption embeddings of images.

        Args:
            images: as for `Captioner.caption`.
            batch_size: images that are encoded together.

        Returns:
            (N, Q, D) float32 on the CPU: Q embeddings of width D for each of the N images.

        Raises:
            ImageError: a file that is not a readable image; the message names it.
        """
        import torch

        pixels, encoder = _pixels(images), self.model.encoder
        embeddings = []
        with torch.no_grad():
            for i in range(0, len(pixels), batch_size):
                squares = encoder.preprocessing.cut(pixels[i : i + batch_size])
                embeddings.append(encoder(encoder.features(squares)).float().cpu())
        return torch.cat(embeddings)

    def reconstruct(
        self, images: "Sequence[Picture]", steps: int = 50, guidance: float = 2.0, seed: int = 42
    ) -> "list[Image.Image]":
        """Let the frozen text-to-image model draw images again from their embeddings.

        Args:
            images: as for `Captioner.caption`.
            steps: number of sampler steps.
            guidance: strength of classifier-free guidance; 1: none.
            seed: seed of the noise; image number i uses `seed + i`, so the result does not depend on batches.

        Returns:
            One square RGB image for each image, in the decoder's size.

        Raises:
            ImageError: a file that is not a readable image; the message names it.
        """
        from PIL import Image

        return [Image.fromarray(drawn) for drawn in self.model.reconstruct(_pixels(images), steps, guidance, seed)]


def load_config(path: str | Path | None = None) -> Config:
    """Read and check a configuration: params.yaml, or a profile of configs/.

    Examples:
        >>> from vlv import load_config
        >>> load_config("configs/tiny.yaml").encoder.queries
        48

    Args:
        path: the YAML file. None: params.yaml of the project that contains the working directory.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, or a value of the wrong type or outside its range.
    """
    if path is None:
        return config.load(Paths.find())
    if not Path(path).is_file():
        raise ConfigError(f"{path} does not exist")
    return config.parse(files.read_text(Path(path)), str(path))


def _located(source: str | Path | None, stage: str) -> tuple[Path, Paths | None]:
    """The model's folder, and the project where its frozen parts are searched."""
    from vlv.inference import model_folder

    in_registry = source is None or str(source).startswith("models:/")
    try:
        paths = Paths.find()
    except ConfigError:
        if in_registry:
            raise
        return Path(str(source)), None  # it contains its parts
    return model_folder(paths, None if source is None else str(source), stage), paths


def _device(name: str | None) -> "torch.device":
    import torch

    from vlv.models import saved

    return torch.device(name) if name else saved.inference_device()


def _pixels(images: "Sequence[Picture]") -> "list[Pixels]":
    """Images in any accepted form -> arrays (H, W, 3) uint8.

    Raises:
        TypeError: a single image instead of a list of images.
    """
    from PIL import Image

    from vlv.io.images import decode, to_rgb

    if isinstance(images, str | Path) or not isinstance(images, Sequence):
        raise TypeError(f"expected a list of images, got {type(images).__name__}; for one image give [image]")
    arrays = []
    for image in images:
        if isinstance(image, str | Path):
            arrays.append(decode(Path(image).read_bytes(), str(image)))
        else:
            arrays.append(to_rgb(image) if isinstance(image, Image.Image) else image)
    return arrays
