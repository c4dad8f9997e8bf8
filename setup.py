"Gives setuptools the metadata of settings.ini and the version of `fasterai/__init__.py`."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters='=')
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
extras = {k.removesuffix('_requirements'): v.split() for k,v in cfg.items() if k.endswith('_requirements')}
urls = dict(Repository=cfg['git_url'], Documentation=cfg['doc_url'])

setup(
    version=re.search(r'__version__ = "(.+)"', (here/'fasterai/__init__.py').read_text(encoding='utf-8'))[1],
    description=cfg['description'], keywords=cfg['keywords'].split(), author=cfg['author'], license=cfg['license'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    project_urls={k:v for k,v in urls.items() if v},
    python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(), extras_require=extras,
    packages=find_packages(include=['fasterai*']), include_package_data=True,
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['fasterai=fasterai._modidx:d']},
    classifiers=['Development Status :: 4 - Beta', 'Intended Audience :: Developers',
                 'Intended Audience :: Science/Research',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence', 'Programming Language :: Python :: 3'])
