"""System prompts by name, and the text that the encoder reads of a prompt. Imports no torch.

The wording is that of the released training and inference code (lumina-image-2.0), of diffusers
(`real`) and, for `panel`, of the paper (arXiv 2503.21758, table 1, template C).
"""

from __future__ import annotations

from dataclasses import dataclass

PROMPT_MARKER = " <Prompt Start> "

TEMPLATES: dict[str, str] = {
    "base": (
        "You are an assistant designed to generate high-quality images based on user prompts."
    ),
    "real": (
        "You are an assistant designed to generate superior images with the superior degree of "
        "image-text alignment based on textual prompts or user prompts."
    ),
    "align": (
        "You are an assistant designed to generate high-quality images with the highest degree of "
        "image-text alignment based on textual prompts."
    ),
    "aesthetics": (
        "You are an assistant designed to generate high-quality images with highest degree of "
        "aesthetics based on user prompts."
    ),
    "4grid": (
        "You are an assistant designed to generate four high-quality images with highest degree of "
        "aesthetics arranged in 2x2 grids based on user prompts."
    ),
}
EMPTY_TEMPLATE = "empty"  # no system prompt and no marker: the prompt alone
PANEL_TEMPLATE = "panel"  # the only template with slots, see `Panel`
TEMPLATE_NAMES = (*TEMPLATES, EMPTY_TEMPLATE, PANEL_TEMPLATE)

# Which half holds the map, and where the picture itself then is.
PANEL_POSITIONS = {
    "lower half": "upper half",
    "upper half": "lower half",
    "left half": "right half",
    "right half": "left half",
}


@dataclass(frozen=True)
class Panel:
    """The slots of the dual-panel template: what is drawn beside the picture, and where.

    Attributes:
        position: a key of `PANEL_POSITIONS`; the picture itself takes the other half.
        content: what that half shows; the model was trained on maps such as `depth map`,
            `canny edge map`, `pose estimation map` and `sketch`.
    """

    position: str = "lower half"
    content: str = "depth map"

    @property
    def text(self) -> str:
        """The system prompt; the angle brackets are part of the wording it was trained with."""
        return (
            f"Generate a dual-panel image where the <{self.position}> displays a <{self.content}>, "
            f"while the <{PANEL_POSITIONS[self.position]}> retains the original image for direct "
            "visual comparison."
        )


def compose_prompt(prompt: str, system_prompt: str, panel: Panel | None = None) -> str:
    """Text the encoder reads: system prompt, marker, prompt. No character of any is changed.

    Args:
        prompt: what the user wrote.
        system_prompt: a name of `TEMPLATE_NAMES`, or free text.
        panel: slots of `PANEL_TEMPLATE`; None = its defaults.
    """
    if system_prompt == EMPTY_TEMPLATE:
        return prompt
    if system_prompt == PANEL_TEMPLATE:
        return (panel or Panel()).text + PROMPT_MARKER + prompt
    return TEMPLATES.get(system_prompt, system_prompt) + PROMPT_MARKER + prompt


def compose_negative(
    negative_prompt: str, system_prompt: str, panel: Panel | None, *, with_template: bool
) -> str:
    """Text the encoder reads for the uncond branch.

    Args:
        negative_prompt: what the user wrote; "" stays the bare empty string in every dialect, as
            in training with dropped captions.
        system_prompt: as for the prompt.
        panel: as for the prompt.
        with_template: a negative that says something gets the system prompt too (official code);
            otherwise it stands alone (diffusers).
    """
    if negative_prompt and with_template:
        return compose_prompt(negative_prompt, system_prompt, panel)
    return negative_prompt
