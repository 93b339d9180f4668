"""Panels for notebooks: pure functions, with ipywidgets over them (`pip install 'pixnerd[notebooks]'`)."""
