"""Ways to start a trainer job, a module each: the setting `launcher` is the module's name.

`resources/launcher.py` says what such a module must do, and finds it.
"""
