"The site: Sphinx reads the notebooks of `nbs/`. `make docs` builds it into `_docs/`; a warning is an error"
import sys
from pathlib import Path

here = Path(__file__).parent
sys.path[:0] = [str(here), str(here.parent)]
import fasterai
from notebooks import linkcode_resolve, settings  # noqa: F401 Sphinx looks for the former here

project = 'fasterai.distill'
author = settings['author']
release = fasterai.__version__
html_title = f'{project} {release}'
copyright = f'{author}, Apache 2.0'
extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx_copybutton', 'notebooks']
if settings['git_url']: extensions.append('sphinx.ext.linkcode')
exclude_patterns = ['**/.ipynb_checkpoints']

nb_execution_mode = 'off'   # pages show the outputs that the notebooks store
nb_merge_streams = True
nb_render_markdown_format = 'myst'  # tables in outputs, too
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'attrs_inline', 'deflist']
myst_heading_anchors = 4
suppress_warnings = ['mystnb.unknown_mime_type',    # widgets; each comes with text as well
                     'misc.highlighting_failure']  # a command over two lines

autodoc_typehints = 'none'  # they are in the tables
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_member_order = 'bysource'
autodoc_class_signature = 'mixed'
python_use_unqualified_type_names = add_module_names = False
toc_object_entries = False

html_theme = 'pydata_sphinx_theme'
html_static_path = ['_static']
html_css_files = ['site.css']
html_favicon = '_static/favicon.svg'
mathjax_path = 'tex-svg.js'  # MathJax 3.2.2, Apache 2.0; here so that the site needs no other host
html_copy_source = html_show_sourcelink = False
html_baseurl = settings['doc_url']
html_sidebars = {page: [] for page in ('index', 'evidence', 'comparison', 'changelog', 'contributing')}  # of no section
html_theme_options = dict(
    navbar_align='left', header_links_before_dropdown=6, show_toc_level=2, navbar_persistent=[],
    navbar_end=['search-button', 'theme-switcher', 'navbar-icon-links'], secondary_sidebar_items=['page-toc'],
    footer_start=['copyright'], footer_end=[], show_prev_next=True, back_to_top_button=True,
    pygments_light_style='a11y-high-contrast-light', pygments_dark_style='github-dark')
if settings['git_url']: html_theme_options['github_url'] = settings['git_url']
