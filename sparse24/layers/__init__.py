"""Modules with a dense weight and its packed forms. Only this room writes a layer's buffers."""

from .modules import *  # noqa: F403  what the room shows is listed there, once
