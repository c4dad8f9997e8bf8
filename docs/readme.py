# nbconvert's settings for README.md: `python -m nbconvert --config docs/readme.py`
c = get_config()  # noqa: F821
c.NbConvertApp.notebooks = ['nbs/index.ipynb']
c.NbConvertApp.export_format = 'markdown'
c.NbConvertApp.writer_class = 'StdoutWriter'
c.NbConvertApp.log_level = 'WARN'
c.NbConvertBase.display_data_priority = ['image/png', 'text/markdown', 'text/plain']
c.TemplateExporter.exclude_input_prompt = True
c.TemplateExporter.exclude_output_prompt = True
