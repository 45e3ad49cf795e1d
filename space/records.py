"""A form for the record that the models take: a field of the page for each of its schema's fields."""

from typing import Any

import gradio as gr
from search import Engine, InputError


class RecordForm:
    """
    Inputs for one record, and the record that they hold.

    Args:
        name: of the modality.
        processor: of it, whose schema is shown.
    """

    def __init__(self, name: str, processor: Any):
        self.name, self.processor = name, processor
        self.kinds = {column: "date" for column in processor.column_names}
        self.kinds |= {field["name"]: field["kind"] for field in processor.fields}
        self.words = {field["name"]: field.get("categories") for field in processor.fields}

    @classmethod
    def of(cls, engines: list[Engine]) -> "RecordForm | None":
        """The form for the first record that every one of the models takes, with the same fields; None without one."""
        found = [engine.records() for engine in engines]
        for name, processor in found[0].items():
            if all(name in other and other[name].column_names == processor.column_names for other in found):
                return cls(name, processor)
        return None

    def inputs(self) -> list:
        """The page's inputs, in the order of `read`; what is left empty is missing."""
        made: list = []
        with gr.Row():
            for column, kind in self.kinds.items():
                options = {"label": column, "min_width": 140, "elem_id": f"field_{len(made)}"}
                if kind == "number":
                    made.append(gr.Number(value=None, **options))
                elif kind == "category":
                    made.append(gr.Dropdown(["", *self.words[column]], value="", **options))
                else:
                    made.append(gr.Textbox(placeholder="2020-01-31", max_lines=1, **options))
        return made

    def read(self, values: tuple) -> dict[str, Any]:
        """
        The record that a visitor filled in.

        Raises:
            InputError: nothing is filled in, or a value is wrong.
        """
        given = {column: value for column, value in zip(self.kinds, values, strict=True) if value not in (None, "")}
        if not given:
            raise InputError(f"Fill in at least one field of the {self.name}.")
        try:
            self.processor([given])
        except ValueError as error:
            raise InputError(str(error).removeprefix("Record, row 0 (from 0), ")) from error
        return given
