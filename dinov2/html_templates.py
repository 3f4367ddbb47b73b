"""The settings that all HTML pages share: values are escaped, and a name that is not given is an error."""

from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined


def template_environment(package: str, extensions: Sequence[str] = ()) -> Environment:
    """An environment for the files in `templates/` of a package, such as `dinov2.curate`.

    Raises:
        ValueError: The package has no such folder.
    """
    return Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        extensions=extensions,
        trim_blocks=True,
        lstrip_blocks=True,
    )
