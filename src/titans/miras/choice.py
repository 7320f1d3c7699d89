"""The base of every MIRAS choice: a small frozen, validated value that JSON can name."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, SerializationInfo, SerializerFunctionWrapHandler, model_serializer

from titans.names import unknown

BY_NAME = {"classes and functions": "by name"}  # serialisation context of a fingerprint, which nobody reads back
Axis = TypeVar("Axis", bound="Choice")


class Choice(BaseModel):
    """One member of one of the four axes, e.g. ``Momentum()`` or ``MLP(depth=2)``.

    A direct subclass is an axis and owns a registry; a class below it that sets ``name`` is a member and is found
    under that name when a configuration is read back from JSON or YAML. Registering an own member is therefore
    nothing but defining the class, before the name is looked up. Fields are the member's arguments and must be
    annotated (``cap: float = 1.5``); ``name`` and whatever else the base declares as a ClassVar need not be.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    axis: ClassVar[str] = ""
    name: ClassVar[str] = ""
    members: ClassVar[dict[str, type[Choice]]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        if "name" in cls.model_fields:
            raise TypeError(f"{cls.__name__}.name must be a ClassVar[str], not a field")
        if "axis" in cls.__dict__:
            cls.members = {}
        elif "name" in cls.__dict__:
            known = cls.members.get(cls.name)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise TypeError(f"{cls.axis} {cls.name!r} is taken by {known.__name__}: choose another name")
            cls.members[cls.name] = cls

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        if info.context == BY_NAME:
            return {"name": type(self).__qualname__, **handler(self)}
        known = self.members.get(self.name)
        if known is None or known.__qualname__ != type(self).__qualname__:
            raise ValueError(f"{self.axis} {type(self).__name__} needs a name of its own (a ClassVar[str]) to be saved")
        return {"name": self.name, **handler(self)}

    @classmethod
    def parse(cls: type[Axis], value: Any) -> Axis:
        """Turn a member, its name, or a mapping with its name and arguments into the member.

        Raises:
            ValueError: the name is unknown, or the value is none of the three.
        """
        if isinstance(value, cls):
            return value
        arguments = {"name": value} if isinstance(value, str) else value
        if not isinstance(arguments, dict) or "name" not in arguments:
            raise ValueError(
                f"{cls.axis} must be one of {sorted(cls.members)} or a mapping with a 'name', got {value!r}"
            )
        arguments = dict(arguments)
        name = arguments.pop("name")
        member = cls.members.get(name) if isinstance(name, str) else None
        if member is None:
            raise ValueError(unknown(cls.axis, name, sorted(cls.members)))
        return member(**arguments)  # type: ignore[return-value]
