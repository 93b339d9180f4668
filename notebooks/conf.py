"""The book: the lessons with the outputs that they are kept with, as web pages (make book)."""

project = "PixNerd workbook"
html_title = project
extensions = ["myst_nb"]
nb_execution_mode = "off"  # `make notebooks` executes them
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 2  # page.md#a-heading
exclude_patterns = ["exercises", "**.ipynb_checkpoints"]
html_theme = "sphinx_book_theme"
html_theme_options = {"home_page_in_toc": True, "show_toc_level": 2, "use_download_button": True}
html_copy_source = True
html_last_updated_fmt = None
