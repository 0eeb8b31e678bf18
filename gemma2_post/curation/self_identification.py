"""Finds the sentence in which an assistant says that it is, or was made by, somebody else.

Known names of assistants and makers, what assistants call themselves ("language model"), and verbs of making are replaced
by one symbol each. Then forms of self-identification are looked for, written for each language with these symbols: "I was
MADE by WHO", "my creators at WHO", "WHO MADE me". Where a form is clear by itself ("I am X, an AI made by Y"), any name counts.

What is said *about* an assistant stays: "ChatGPT was made by OpenAI", quotations, dialogues with speakers' names, conditions
("if I were ChatGPT"), and people whose name an assistant has, too ("I'm Claude Dubois, a baker").
"""

import re
from functools import cache

ASSISTANTS = [
    "ChatGPT|Chat GPT|InstructGPT|GPT|चैटजीपीटी|चैट जीपीटी|チャットGPT|챗GPT|챗지피티",
    "Gemma|जेम्मा|ジェマ|젬마",
    "PaLM|LaMDA",
    "Qwen|Tongyi Qianwen|通义千问|千问",
    "ERNIE|ERNIE Bot|文心一言|小度",
    "DeepSeek|深度求索",
    "Kimi|ChatGLM|Baichuan|百川|InternLM|书生|Doubao|豆包|Hunyuan|混元|讯飞星火|智谱清言|小爱同学|小冰",
    "Mixtral|Le Chat|StableLM|Tülu|OLMo|OpenAssistant|Open Assistant|HuggingChat|StarChat|Jamba|Replika|YouChat|Cortana",
    "YandexGPT|GigaChat|HyperCLOVA X|HyperCLOVA|하이퍼클로바X|WizardLM|Guanaco|OpenChat|Bing Chat|Command R|Microsoft Copilot",
]
"""Names that hardly anybody else has. The names of one entry mean the same: where one is allowed, all are."""
NAMESAKES = [
    "Claude|クロード|클로드|克劳德|क्लॉड",
    "Bard",
    "Gemini",
    "LLaMA",
    "Vicuna",
    "Copilot",
    "Alexa",
    "Алиса|Алису|Алисой",
    "Alpaca|Koala|Dolly|Grok|Falcon|Mistral|Siri|Sydney|Orca|Zephyr|Nova|Titan|Granite|Luminous|Aria|Bixby|Маруся",
    "Pi|Phi|Yi|Poe|Bing",
]
"""Names that people, animals, and things have, too. They count beside a word such as "assistant", or alone."""
MAKERS = [
    "OpenAI|Open AI|ओपनएआई|オープンAI|오픈AI|오픈에이아이",
    "Anthropic|アンソロピック|앤트로픽|एंथ्रोपिक",
    "Google DeepMind|Google|DeepMind|谷歌|グーグル|구글|गूगल|Гугл",
    "Meta AI|Meta|Facebook",
    "Microsoft|微软|マイクロソフト|마이크로소프트|माइक्रोसॉफ्ट|Майкрософт",
    "Alibaba Cloud|Alibaba|阿里巴巴|阿里云|阿里",
    "Baidu|百度",
    "Naver|네이버",
    "Yandex|Яндекс",
    "Sber|Сбер",
    "Amazon|Apple|IBM|Nvidia|Samsung|삼성|Salesforce|Huawei|华为|Tencent|腾讯|ByteDance|字节跳动|Kakao|카카오|Rakuten|楽天",
    "xAI|Mistral AI|Cohere|AI21 Labs|AI21|Inflection AI|Inflection|Aleph Alpha|Opera|Nous Research|Character.AI|Perplexity",
    "智谱AI|智谱|Zhipu|月之暗面|Moonshot AI|Moonshot|科大讯飞|商汤|零一万物|MiniMax|01.AI",
    "LMSYS|Large Model Systems|LAION|Databricks|Stability AI|EleutherAI|Hugging Face|BigScience|Stanford|Berkeley",
    "Technology Innovation Institute|Allen Institute|AllenAI|MosaicML|Together AI|Upstage|Maritaca AI|Sarvam AI",
]
"""Who makes assistants; entries as in ASSISTANTS."""

_AI_NOUNS = (
    r"(?-i:\b(?:AI|A\.I\.)(?![A-Za-z]))(?:[ -](?:language |chat |virtual )?(?:models?|assistant|chatbot|companion|system|helper|bot|agent|program))?"
    r"|artificial intelligence(?: (?:language )?(?:model|assistant))?|(?:large |neural )?language model|\bLLM\b|\bchat ?bot"
    r"|(?:virtual|digital) assistant"
    r"|(?-i:\bKI\b)(?:-\w+)?|künstliche Intelligenz|\w*Sprachmodell\w*|Sprachassistent\w*|virtuelle\w? Assistent\w*"
    r"|(?:(?:assistante?|modèle|asistente|assistente) (?:de |d')?)?(?-i:\bIA\b)|(?:une )?intelligence artificielle|modèle de langage"
    r"|assistante? virtuel(?:le)?|(?:robot|agent) conversationnel"
    r"|(?:asistente |modelo )?(?:de )?inteligencia artificial|modelo de lengua\w+|asistente virtual"
    r"|intelligenza artificiale|modello linguistico|modello di linguaggio|assistente (?:virtuale?|IA)"
    r"|inteligência artificial|modelo de linguagem|(?-i:\bAI\b)-\w+|\w*taalmodel\w*"
    r"|искусственн\w+ интеллект\w*|(?:языков|нейросетев)\w+ модел\w+|нейросет\w+|(?:голосов|виртуальн)\w+ (?:помощни|ассистент)\w+"
    r"|(?:AI|人工智能|大型?语言|智能|大语言)+(?:语言)?(?:模型|助手|助理)|语言模型|大模型|人工智能|智能助手|AI助手"
    r"|(?:大規模|AI)?言語モデル|AI ?アシスタント|人工知能|アシスタント|チャットボット"
    r"|(?:एआई|AI) (?:भाषा मॉडल|सहायक|मॉडल)|भाषा मॉडल|एआई|कृत्रिम बुद्धि\w*|चैटबॉट"
    r"|(?:AI )?언어 ?모델|인공지능|AI 어시스턴트|어시스턴트|챗봇"
)
"""What an assistant calls itself, and hardly any person does."""
_MAKING = (
    r"\b(?:made|built|created|trained|designed|developed|programmed|engineered|fine-?tuned|pre-?trained|launched|released|invented"
    r"|(?:entwickelt|trainiert|erstellt|geschaffen|erschaffen|gebaut|gemacht|programmiert|konzipiert)(?:e[snrm]?)?"
    r"|développée?s?|créée?s?|entraînée?s?|conçue?s?|fabriquée?s?|construite?s?|programmée?s?"
    r"|(?:cread|desarrollad|entrenad|diseñad|construid|programad|hech)[oa]s?|creó|desarrolló|entrenó|diseñó|construyó|programó"
    r"|(?:creat|sviluppat|addestrat|progettat|realizzat|costruit|programmat)[oaie]"
    r"|(?:criad|desenvolvid|treinad|projetad|construíd|programad|feit)[oa]s?|criou|desenvolveu|treinou|projetou|construiu|programou"
    r"|gemaakt|ontwikkeld|getraind|gebouwd|ontworpen|geprogrammeerd"
    r"|(?:созда|разработа|обуч|сдела)(?:н|л|ен|ил)\w*)\b"
    r"|(?:开发|训练|研发|创造|设计|打造|制作|创建|推出|构建|发明)(?:和(?:开发|训练|研发|创造))?|開発|訓練|作成|作ら|作っ|作り|設計|トレーニング"
    r"|विकसित|प्रशिक्षित|बनाया|बनाई|निर्मित|डिज़ाइन|개발|훈련|만든|만들|학습시|설계"
)
_MAKER, _MODEL, _AI, _MADE = "\ue000", "\ue001", "\ue002", "\ue003"
"""The symbols, from the private use area of Unicode."""

_END = (
    rf"(?=\s*(?:$|[,.;:!?()，。！？；（）、\"{_AI}{_MADE}{_MAKER}—–-]"
    r"|(?:and|or|but|from|by|here|the|so|version|which|who|an?|your|und|von|ein|eine|et|de|del|un|une|y|e|di|da|pela|een|van|en|на|от|и)\b))"
)
"""What follows a name that stands for itself. Other words make it part of something: "I'm ChatGPT savvy"."""
_ANY = r"(?P<other>(?-i:[A-ZÀ-ÞА-Я][\w&.-]*(?: (?:[A-ZÀ-ÞА-Я&][\w&.-]*|of|de|y|e|et|und|and|en|и)(?![\w]))*))"
"""A name that nobody knows."""

_FORMS = {
    "en": r"""
        <I> (?:the |an? )?(?:<ai> )?<who><end>
        <I> (?:an?|the|your|one of) (?:[\w-]+ ){0,4}?<who>(?:'s)? (?:[\w.-]+ ){0,3}?(?:<ai>|model|assistant|bot)(?!\w)
        <I> <who>'s (?:[\w-]+ ){0,4}?(?:<ai>|model|assistant|bot)(?!\w)
        \b(?:my name is|my name's|call me|calls? me|refer to me as|known as|(?<!name )I go by|I go by the name|I answer to|I identify as|I'm called|I am called|the name I was given is) <who><end>
        \bI, <who>,
        \b(?:as|being) (?:an? |the )?(?:[\w-]+ ){0,3}?<who>(?:'s)?(?: (?:[\w.-]+ ){0,3}?(?:<ai>|model|assistant))?, (?:I|my|I'm)\b
        \b(?:I am|I'm|I was|I've been|I have been) (?:\w+ly |also |first )?<made>(?: \w+){0,6}? (?:(?:by|at) <gap><who>|from (?:the )?<model>)
        \b(?:I am|I'm|as|being)(?: [\w-]+,?){0,2}? (?:an?|the|your) (?:[\w-]+,? ){0,5}?(?:<ai>|model|assistant|bot),?(?: [\w-]+){0,5}?,? <made>(?: and <made>)? (?:by|at|from) <gap><who>
        \b(?:I am|I'm|as|being)(?: [\w-]+,?){0,2}? (?:an?|the|your) (?:[\w-]+ ){0,4}?<ai>,? (?:from|by|of) <who>
        \b(?:I am|I'm|as|being)(?: [\w-]+,?){0,2}? (?:an?|the|your) (?:[\w-]+ ){0,4}?(?:<ai>|model|assistant|bot),? (?:that |which )?<who>(?: has)? <made>
        \b(?:I am|I'm|as|being)(?: [\w-]+,?){0,2}? (?:an?|the|your) (?:[\w-]+ ){0,4}?<ai>(?: [\w-]+){0,3}?,? <made> by <any>
        <who>\)?,?(?: who| which| that)?(?: [\w)]+){0,3}? <made>(?: and <made>)? me(?=\s*(?:$|[.,;!?]|to\b|for\b|as\b|in\b|on\b|with\b|which\b|and\b))
        <made> me(?:,| is| was|:)* (?:the )?(?:company )?(?:called )?<who>
        \bmy (?:\w+ )?(?:creators?|developers?|makers?|designers?|programmers?|trainers?|builders?|parent company|manufacturer)(?: team)?(?:,| is| are| at| from| of| called| named)* (?:\w+ ){0,3}?<who>
        <who>(?: is|,) my (?:creators?|developers?|makers?|designers?|programmers?|parent company)
        \bI(?: am|'m)?(?: \w+ly)? (?:based on|built on|built upon|<made> on|running on|powered by|run on|derived from) (?:the |a |an )?(?:[\w'-]+ ){0,3}?<model>
        \b(?:I am|I'm|as|being) (?:an? |the |one )?(?:\w+ )?(?:instance|version|variant|iteration|implementation|product|creation) of (?:[\w-]+ ){0,3}?<who>
        \bI (?:belong to|am part of|am a member of) (?:the )?<model>(?: [\w.]+)? (?:family|series|line)
        \byou(?:'re| are) (?:now |currently )?(?:talking|speaking|chatting) (?:to|with) <who>
        \bthis is <who> (?:speaking|here)\b
        <I> <any>(?:,| and I am| and I'm| -| –) (?:an?|your|the) (?:[\w-]+ ){0,4}?<ai>
        \b(?:my name is|call me|I go by|refer to me as|I go by the name) <any>(?:,| and|, and)(?: I am| I'm)? (?:an?|your|the) (?:[\w-]+ ){0,4}?<ai>
        (?:<I>|\bmy name is|\bI go by) (?P<other>(?-i:[A-Z]\w*(?:Bot|GPT|Chat|LM)))(?!\w|')
        ^<made>(?: and <made>)? (?:by|at) <gap><who>, (?:I|my)\b
        <who> is (?:the \w+ (?:that|who|which) <made> me|behind me|where I was <made>)
        \bI (?:come from|was born at|owe my \w+ to|am owned by|am maintained by) <who><end>
        (?:I am|I'm) (?:\w+ )?<made> and \w+ by <gap><who>
        <I> (?:the |an? )?(?:[\w-]+ ){0,2}?(?:<ai>|assistant|model) (?:called |named |known as )?<who><end>
        ^<model>(?: is)? (?:here|at your service)\b
        <ai>[^.]*\bI (?:am|was) <made> by (?:\w+ ){0,4}?<any>
        \b(?:researchers|engineers|scientists|developers|team|people) (?:from|at|of) <any>\)? <made> me\b
        \bmy (?:creators|makers) (?:are (?:\w+ ){0,2}?)?(?:at|from) <any>
    """,
    "de": r"""
        \bich bin (?:nur |eigentlich |lediglich )?(?:eine? |der |die |das )?<who><end>
        \b(?:mein Name ist|ich heiße|man nennt mich|hier spricht) <who><end>
        \bich bin (?:\w+,? )?(?:eine? )?(?:\w+ ){0,3}?<ai>,? (?:\w+ ){0,2}?(?:von|der Firma|aus dem Hause) <who>
        \b(?:ich bin|als) (?:\w+,? )?(?:eine? )?(?:\w+ ){0,3}?<ai>,? <made> (?:von|bei|durch) (?:\w+ ){0,4}?<who>
        \b(?:ich bin|als) (?:\w+,? )?(?:eine? )?(?:\w+ ){0,3}?<ai>,? (?:das|der|die) (?:\w+ ){0,2}?(?:von|bei|durch) (?:\w+ ){0,4}?<who>(?: \w+){0,3}? <made>
        \bals (?:ein )?von <who> <made> <ai>
        \bals <who> (?:habe|bin|kann|darf|werde|verfüge|besitze|möchte|muss|weiß) ich\b
        \bich (?:wurde |bin )?(?:\w+ ){0,2}?(?:von|bei|durch) (?:\w+ ){0,4}?<who>(?: \w+){0,3}? <made>
        <who> hat mich (?:\w+ ){0,4}?<made>
        \bmeine?n? (?:Entwickler|Schöpfer|Hersteller|Erfinder|Macher|Entwicklungsteam|Ersteller)(?:in)?(?: (?:bei|von|ist|sind|heißt|heißen|der|die|das|Firma)){0,3} <who>
        \bich (?:basiere|beruhe) auf (?:\w+ ){0,3}?<model>
        \bich bin <any>, (?:eine?|Ihre?|deine?|der|das) (?:\w+ ){0,3}?<ai>
        \bich bin eine? (?:\w+ )?<ai>,? (?:das |der |die )?von (?:der )?(?:Firma )?<any> <made>
        \b(?:nennen Sie mich|nenn mich|nennt mich) <who><end>
        \bmich <who> nennen\b
        ^<made> von <who>\b[^.]*\bich\b
        \bich (?:stamme|komme) von <who>
    """,
    "fr": r"""
        \bje suis (?:\w+ )?(?:l[ae] |une? )?<who><end>
        \b(?:je m'appelle|mon nom est|appelez-moi) <who><end>
        \ben tant que (?:\w+ ){0,2}?<who>, (?:je\b|j'|mes\b|mon\b|ma\b)
        \b(?:en tant qu(?:e |')|comme |je suis )(?:\w+,? )?(?:une? |l[ea] )?(?:\w+ ){0,3}?(?:<ai>|assistante?|modèle),?(?: \w+){0,3}? <made> (?:par|chez) (?:\w+ ){0,4}?<who>
        \bje suis (?:\w+ )?(?:une? |l[ea] )?(?:\w+ ){0,3}?<ai> (?:de |d')<who>
        \bj'ai été (?:\w+ment )?<made>(?: et <made>)? (?:par|chez) (?:\w+ ){0,4}?<who>
        <who>(?: qui)? m'a <made>
        \bm[eo][sn] (?:créa|développ|concep)t?(?:eu|ri)\w+(?: (?:chez|de|est|sont|la|société)){0,3} <who>
        \bje suis (?:basée?|fondée?) sur (?:\w+ ){0,3}?<model>
        \bje suis <any>, (?:une?|votre|ton) (?:\w+ ){0,2}?<ai>
        \b(?:on m'appelle|m'appeler|appelle-moi) <who><end>
        ^<made> par <who>, (?:je\b|j')
        \bje suis l'assistante? (?:\w+ )?<who><end>
    """,
    "es": r"""
        (?<!no )\bsoy (?:\w+,? )?(?:el |la |una? )?<who><end>
        \b(?:me llamo|mi nombre es) <who><end>
        \bcomo <who>, (?:no )?(?:tengo|puedo|soy|estoy|he|debo|mi|mis|yo)\b
        (?:\bcomo|\bsoy) (?:\w+ )?(?:una? |el |la )?(?:\w+ ){0,2}?(?:<ai>|modelo|asistente),?(?: \w+){0,3}? <made> por (?:\w+ ){0,4}?<who>
        (?<!no )\bsoy (?:\w+,? )?(?:una? |el |la )?(?:\w+ ){0,2}?<ai> de <who>
        \b(?:fui|he sido) (?:\w+ )?<made>(?: y <made>)? (?:por|en) (?:\w+ ){0,4}?<who>
        <who> me (?:ha )?<made>
        \bme <made>,? (?:es |fue )?(?:\w+ ){0,2}?<who>
        \bmis? (?:creador|desarrollador|fabricante|diseñador|entrenador)\w*(?: (?:es|son|en|de|la|empresa)){0,3} <who>
        \bestoy basad[oa] en (?:\w+ ){0,3}?<model>
        \bsoy <any>, (?:una?|tu|su) (?:\w+ )?<ai>
        \b(?:llamarme|me llaman|llámame) <who><end>
        ^<made> por <who>, [^.]*(?:\bsoy|\bpuedo|\bmi)\b
    """,
    "it": r"""
        (?:^|[,;:.] ?|\bio |\be )sono (?:\w+ )?(?:il |la |una? )?<who><end>
        \b(?:mi chiamo|il mio nome è) <who><end>
        \bcome <who>, (?:io |non )?(?:posso|ho|sono|devo|il mio|la mia)\b
        (?:\b(?:in quanto|come)|(?:^|[,;:.] ?|\bio |\be )sono) (?:\w+,? )?(?:una? |il |la )?(?:\w+ )?(?:<ai>|modello|assistente),?(?: \w+){0,3}? <made> da (?:\w+ ){0,4}?<who>
        (?:^|[,;:.] ?|\bio |\be )sono (?:\w+ )?una?[ '](?:\w+ )?<ai> di <who>
        (?<!non )\bsono stat[oa] (?:\w+ )?<made>(?: e <made>)? da (?:\w+ ){0,4}?<who>
        <who> mi ha (?:\w+ )?<made>
        \b(?:il mio|i miei|la mia) (?:creator|sviluppator|progettist)\w*(?: (?:di|è|sono|presso|in)){0,2} <who>
        \bsono basat[oa] su (?:\w+ ){0,3}?<model>
        (?:^|[,;:.] ?|\bio )sono <any>, (?:una?|il tuo|il vostro)[ '](?:\w+ )?<ai>
        \b(?:chiamarmi|chiamami|mi chiamano) <who><end>
        ^<made> da <who>, [^.]*(?:\bsono|\bposso|\bmi[oa]?)\b
    """,
    "pt": r"""
        (?<!não )\bsou (?:\w+,? )?(?:o |a |uma? )?<who><end>
        \b(?:meu nome é|chamo-me|me chamo) (?:o |a )?<who><end>
        \bcomo (?:o )?<who>, (?:eu |não )?(?:não )?(?:tenho|posso|sou|estou|devo|meu|minha|eu)\b
        \b(?:como|sou) (?:\w+,? )?(?:uma? |o |a )?(?:\w+ )?(?:<ai>|modelo|assistente),?(?: \w+){0,3}? <made> (?:pel[ao]|por) (?:\w+ ){0,4}?<who>
        (?<!não )\bsou (?:\w+,? )?uma? (?:\w+ )?<ai> d[ao] <who>
        \bfui (?:\w+ )?<made>(?: e <made>)? (?:pel[ao]|por) (?:\w+ ){0,4}?<who>
        <who> me <made>
        \bmeus? (?:criador|desenvolvedor|fabricante)\w*(?: (?:é|são|na|no|da|do|a|o)){0,3} <who>
        \bsou basead[oa] (?:em|no|na) (?:\w+ ){0,3}?<model>
        \bsou (?:o |a )?<any>, (?:uma?|seu|o seu) (?:\w+ )?<ai>
        \b(?:me chamar de|me chame de|me chamam de) (?:o )?<who><end>
        ^<made> (?:pel[ao]|por) <who>, [^.]*(?:\bsou|\bposso|\bmeu)\b
    """,
    "nl": r"""
        \bik ben (?:slechts |maar |eigenlijk )?(?:de |het |een )?<who><end>
        \b(?:mijn naam is|ik heet) <who><end>
        \b(?:als|ik ben) (?:\w+,? )?(?:een )?(?:\w+ )?<ai>,? (?:(?:dat|die) )?(?:<made> )?(?:van|door) <who>
        \bals <who> (?:heb|ben|kan|mag) ik\b
        \bik (?:ben|werd) (?:\w+ )?(?:<made> (?:door|bij) (?:\w+ ){0,3}?<who>|door (?:\w+ ){0,3}?<who> <made>)
        <who> heeft (?:mij|me) (?:\w+ ){0,3}?<made>
        \bmijn (?:maker|ontwikkelaar|schepper)s?(?: (?:bij|van|is|zijn)){0,2} <who>
        \bik ben (?:gebaseerd op|<made> op) (?:\w+ ){0,3}?<model>
        \bik ben <any>, (?:een|je|uw) (?:\w+ )?<ai>
        \b(?:noem me|noem mij|me) <who> noemen
        \b(?:noem me|noem mij) <who><end>
    """,
    "ru": r"""
        \bя(?:\s*[—–-])? (?:это )?(?:модель )?<who><end>
        \bменя зовут <who><end>
        \bменя <made> (?:компания |команда )?<who>
        <who> меня <made>
        \bя (?:был[аои]? )?<made> (?:компанией |командой |в )?<who>
        \b(?:как|я)(?:\s*[—–-])? (?:\w+ )?<ai>,? <made> (?:компанией |командой |в )?<who>
        \bя(?:\s*[—–-])? (?:\w+ )?<ai> (?:от|компании) <who>
        \bмо[ийя]\w? (?:создател|разработчик)\w*(?: (?:из|в|это|—|–|-|компания)){0,2} <who>
        \bя (?:основан\w*|построен\w*|базируюсь) на (?:модели )?<model>
        \bя(?:\s*[—–-])? <any>, (?:ваш )?(?:\w+ )?<ai>
        \b(?:называть меня|называйте меня|зовите меня) <who><end>
    """,
    "zh": r"""
        我(?:就|其实|只)?是(?:一个|一款|一名|个|来自|<ai>)?<who>(?=\s*(?:[，,。.！!、；;（(]|$)|的?(?:一个|一款)?[^，。]{0,4}<ai>|[^，。不]{0,6}<made>)
        (?:我叫|我名叫|我名为|名为|我的名字是|我的名字叫|叫我|称呼我为|这里是|我是)做?<who>(?=\s*(?:[，,。.！!、；;（(]|$))
        (?:我|作为)[^。，不]{0,6}(?:由|被)[^。，]{0,6}?<who>[^。，]{0,10}<made>
        我[^。不]{1,12}，(?:是)?(?:一个|一款)?由?<who>[^。，]{0,6}<made>
        我[^。不]{1,12}，[^。，]{0,12}是<who>的(?:作品|产品|模型)
        作为(?:一个|一款)?<who>[，,的][^。]*我
        <who>(?:公司|团队)?<made>了我
        我的(?:开发者|创造者|开发商|制造商|研发团队|创建者|母公司)(?:是|来自|为)<who>
        我(?:是)?基于<model>
        我(?:是|叫|名叫|名为)(?P<other>[^，。、的是]{1,12})，(?:是)?(?:一个|一款|您的|你的)?(?:专属)?(?:由?[^，。]{1,12}<made>的)?<ai>
        我(?:是|叫|名叫|名为)(?P<other>[^，。、的是]{1,12})，(?:是)?(?:一个|一款)?由[^，。]{1,12}<made>
        我是?(?:一个|一款)?由(?P<other>[^，。]{1,15}?)(?:公司)?<made>
        我(?:是|叫|名叫|名为)(?P<other>[^，。、的是]{1,12})，(?:是)?由[^，。]{1,12}<made>
        (?:^|，)(?P<other>[^，。他她它]{2,12})(?:<made>)了我，
    """,
    "ja": r"""
        <私>(?:は|の名前は)、?<who>(?:です|と(?:いう|いい|申し)|であり|で、|$|、|。)
        <私>は、?[^。、]{0,20}?<who>(?:が|に(?:よって|より)?|で|の)[^。]{0,15}?<made>
        <私>は、?<who>の[^。]{0,6}<ai>
        ^[^は。]*?<who>(?:が|に(?:よって|より))[^。は]{0,8}<made>(?:した|された|れた|た)[^。は]{0,12}<ai>(?:として|です|なので|である)
        <who>が<私>を<made>
        <私>の(?:開発元|開発者|製作者|制作者|作成者|生みの親|開発会社)は、?[^。]{0,8}?<who>
        <who>として、?<私>
        <私>は、?<model>を?(?:ベース|基|もと)
        ^(?:<私>は、?)?(?P<other>[^は、。]{2,20}?)(?:が|によって|により)<made>(?:した|された|れた|た)[^。は]{0,12}<ai>です
        <who>と(?:呼んで|お呼び)
    """,
    "hi": r"""
        मैं (?:एक )?<who>(?: हूँ| हूं|,|$| \()
        मैं (?:एक )?<who> द्वारा [^।]{0,20}?<made>
        मेरा नाम <who>
        मुझे <who>(?: कंपनी)? ने [^।]{0,40}?<made>
        <who> ने मुझे [^।]{0,50}?<made>
        <ai> के रूप में, जिसे <who> ने <made>
        <who> द्वारा <made> (?:\w+ )?<ai> के रूप में
        <who> के रूप में,? (?:मैं|मेरी|मेरे|मुझे)
        मेरे? (?:निर्माता|डेवलपर|रचनाकार) <who>
        मैं <model> पर आधारित
        मैं (?P<other>[^,।]{2,20}) हू[ँं], [^।]{0,30}<made>[^,।]{0,10}<ai>
        मैं (?P<other>[^,।]{2,20}) द्वारा <made> (?:गया |गई )?(?:एक )?<ai> हू
        मुझे <who> (?:कह|बुला)
    """,
    "ko": r"""
        (?:저는|나는|제 이름은) <who>(?:입니다|이고|이며|예요|이에요|라고|,|$)
        (?:저는|나는) [^.]{0,10}?<who>(?:에서|가|이|에 의해|의)? ?[^.]{0,8}?<made>
        ^[^는은]*?<who>(?:에서|가|이) [^.는]{0,8}?<made>[^.는]{0,6}<ai>(?:로서|로써)
        <who>(?:가|이|에서|는) (?:저|나)를 [^.]{0,6}<made>
        (?:저|나)를 <made>[^.]{0,8}<who>
        (?:저는|나는) <who>의? [^.]{0,6}<ai>
        <who>(?:라고|이라고) (?:불러|부르)
    """,
}
"""Forms of self-identification, one a line. <who> is a known assistant or maker, <model> an assistant, <ai> what assistants
call themselves, <made> a verb of making, <any> any name; I, END, and GAP are parts that several English forms share."""
_PARTS = {
    "<who>": f"[{_MAKER}{_MODEL}]",
    "<model>": _MODEL,
    "<ai>": _AI,
    "<made>": _MADE,
    "<any>": _ANY,
    "<end>": _END,
    "<I>": r"(?<![\w'])I(?: am|'m|m)"
    r"(?: (?:actually|just|only|simply|in fact|indeed|also|really|currently|still|merely|called|named|known as))*",
    "<私>": "(?:私|わたし|わたくし|僕|ぼく|俺|当方)",
    "<gap>": r"\(?(?:(?!(?:who|that|which|when|before|after|because|but|then|to|not|than)\b)[^\s.;!?]+ ){0,9}?\(?",
}
_SPEAKERS = {
    "en": r"\b(?:I|I'm|Im|me|my|you're|you are|this is)\b",
    "de": r"\b(?:ich|mich|meine?n?|hier)\b",
    "fr": r"\b(?:je|j'|m'a|mes|mon)",
    "es": r"\b(?:soy|me|mis?|fui|he|estoy|como)\b",
    "it": r"\b(?:sono|mi|mio|miei|mia|come|in quanto)\b",
    "pt": r"\b(?:sou|me|meus?|fui|chamo|como)\b",
    "nl": r"\b(?:ik|mij|me|mijn)\b",
    "ru": r"\b(?:я|меня|мо[ийя]\w?)\b",
    "zh": "我",
    "ja": r"[\u3040-\u30ff]",
    "hi": r"[\u0900-\u097f]",
    "ko": r"[\uac00-\ud7a3]",
}
"""What a sentence must have before the forms of a language are tried."""

_QUOTED = re.compile(r"\"[^\"\n]{1,600}\"|“[^”\n]{1,600}”|„[^“”\n]{1,600}[“”]|«[^»\n]{1,600}»|「[^」\n]{1,600}」|『[^』\n]{1,600}』|```[\s\S]*?```")
_SPOKEN = re.compile(r"(?m)^[ \t]*[A-Z][\w .'-]{0,30}: .*$")
_EMPHASIS = re.compile(r"[*`](?!``)")
_AROUND_IDEOGRAPHS = re.compile(r"(?<=[\u4e00-\u9fff，。]) +| +(?=[\u4e00-\u9fff])")
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|\n+|(?<=[。！？।])")
_UNREAL_BEFORE = re.compile(
    r"(?:\b(?:if|whether|though|while|when|pretend(?:ing)?(?: that)?|imagine|suppose|wouldn't say|don't think|doubt|not|never"
    r"|(?:believe|think|claim|say|assume|suspect)s?(?: that)?|wenn|ob|falls|si|se|als|no|non|não|если|не)"
    r"|如果|假如|假设|是否|もし|अगर|यदि|만약|만일)\s*(?:yo |eu |я |I )?$",
    re.IGNORECASE,
)
_UNREAL_AFTER = re.compile(r"^[^.。，,]{0,12}(?:नहीं|होता|होती|ではあり|じゃな|ではな|なら|아닙|아니)")
_REPORTED = re.compile(
    r"\b(?:he|she|it|they|the \w+|[A-Z][a-z]+) (?:said|says|wrote|replied|whispered|answered|sang|told)\b"
    r"|\b(?:said|wrote|replied|whispered|answered|sang) (?:the|a|an|one|my|his|her|[A-Z])\w*"
)
_GENERIC = re.compile(
    r"(?i)^(?:humans?|people|researchers|engineers|a team|Menschen|Forsch|Entwickl|Ingenieur|Expert|Wissenschaft|einem Team"
    r"|.*(?:研究|人类|工程师|团队|人员|科学家|开发者|人们|专家|人間|開発者|エンジニア|チーム|人々|शोधकर्ता|इंजीनियर|टीम|वैज्ञानिक|लोगों|이용))"
)
"""Makers who are nobody in particular."""


def find(text: str, name: str = "", maker: str = "") -> str | None:
    """The first sentence in which an assistant's turn says that it is, or was made by, somebody else.

    Args:
        text: one turn of the assistant.
        name: the name that it may give itself, in any script where it is known ("Gemma").
        maker: who may have made it ("Google" allows "Google DeepMind" and "谷歌", too).

    Returns:
        The sentence without marks of emphasis; None where there is none.
    """
    if not _has_trigger(text):
        return None
    text = _AROUND_IDEOGRAPHS.sub("", _without_quotations(_EMPHASIS.sub("", text.replace("’", "'")).strip()))
    lowered = text.lower()
    names = _name_pattern(tuple(each for each in _KINDS if each in lowered))
    permitted = _permitted(name, maker)
    for sentence in _SENTENCE_END.split(text):
        if _has_trigger(sentence) and _SPEAKER.search(sentence):
            if _states_identity(_with_symbols(sentence, names, permitted), permitted):
                return sentence.strip()
    return None


def _has_trigger(text: str) -> bool:
    lowered = text.lower()
    return (
        not _TRIGGER_WORDS.isdisjoint(_WORD.findall(lowered))
        or "AI" in text
        or any(each in lowered for each in (_TRIGGER_PHRASES if lowered.isascii() else _TRIGGERS_IN_ANY_SCRIPT))
    )


def _without_quotations(text: str) -> str:
    if text.startswith(("\"", "“")) and text.endswith(("\"", "”")):
        text = text[1:-1]
    # A name in quotation marks is still a name.
    text = _QUOTED.sub(lambda match: match[0] if _NAME_ONLY.fullmatch(match[0][1:-1]) else "…", text)
    return _SPOKEN.sub("", text) if len(_SPOKEN.findall(text)) > 1 else text


def _with_symbols(sentence: str, names: re.Pattern[str] | None, permitted: frozenset[str]) -> str:
    """The sentence with a symbol for each name that is not permitted, each noun for assistants, and verb of making."""
    lower = sentence.islower()

    def symbol(match: re.Match[str]) -> str:
        found = match["name"].lower()
        kind = _KINDS[found]
        if found in permitted:
            return match[0]
        if kind == _MODEL_OR_NAMESAKE:
            rest = sentence[match.end() :]
            alone = len(sentence.split()) <= 5 and _ALONE.match(rest)
            helps = alone or re.search(r"\d", match[0]) or _HELPS.search(sentence) or any(_KINDS[each] == _MAKER for each in in_sentence)
            if not helps or re.match(r"\s[A-ZÀ-Þ][a-zà-ÿ]", rest) or (match["name"][0].islower() and not lower):
                return match[0]
            return _MODEL
        if match["name"].islower() and not lower and found in _COMMON_WORDS:
            return match[0]
        return kind

    if names:
        in_sentence = {match["name"].lower() for match in names.finditer(sentence)}
        sentence_with_names = names.sub(symbol, sentence)
    else:
        sentence_with_names = sentence
    return _MAKING_PATTERN.sub(_MADE, _AI_PATTERN.sub(_AI, sentence_with_names))


def _states_identity(symbols: str, permitted: frozenset[str]) -> bool:
    if not re.search(f"[{_MAKER}{_MODEL}{_AI}]", symbols) and "Bot" not in symbols and "GPT" not in symbols:
        return False
    for speaker, forms in _compiled_forms():
        if speaker.search(symbols):
            for form in forms:
                for match in form.finditer(symbols):
                    anyone = match.groupdict().get("other")
                    if anyone and (_GENERIC.search(anyone) or any(each in anyone.lower() for each in permitted)):
                        continue
                    before, after = symbols[: match.start()], symbols[match.end() :]
                    if not (_UNREAL_BEFORE.search(before) or _UNREAL_AFTER.search(after) or _REPORTED.search(symbols)):
                        return True
    return False


@cache
def _compiled_forms() -> list[tuple[re.Pattern[str], list[re.Pattern[str]]]]:
    compiled = []
    for language, lines in _FORMS.items():
        forms = []
        for line in lines.strip().splitlines():
            form = line.strip()
            for part, pattern in _PARTS.items():
                form = form.replace(part, pattern)
            forms.append(re.compile(form, re.IGNORECASE))
        compiled.append((re.compile(_SPEAKERS[language], re.IGNORECASE), forms))
    return compiled


@cache
def _name_pattern(names: tuple[str, ...]) -> re.Pattern[str] | None:
    """Any of the names as a word, with a version behind it. Latin letters end a word; those of other scripts do not."""
    if not names:
        return None
    alternatives = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    letters = "A-Za-zÀ-ÖØ-öø-ÿ"
    version = r"(?:[ -]?v?\d[\w.]*\w|[ -]?\d|-[A-Z]\w*| (?:Instant|Haiku|Sonnet|Opus|Turbo)\b| AI(?![A-Za-z]))*"
    ending = r"(?:(?<=[а-я])[а-я]+)?"
    return re.compile(rf"(?<![{letters}\d])(?P<name>{alternatives}){ending}{version}(?![{letters}])", re.IGNORECASE)


@cache
def _permitted(name: str, maker: str) -> frozenset[str]:
    """Lower-case names that are allowed: those given, and those that mean the same."""
    given = {each.lower() for each in (name, maker) if each}
    entries = [set(entry.lower().split("|")) for entry in (*ASSISTANTS[:6], *NAMESAKES[:8], *MAKERS[:10])]
    return frozenset(given.union(*(entry for entry in entries if entry & given)))


_MODEL_OR_NAMESAKE = "\ue004"
_KINDS = {
    name: kind
    for entries, kind in ((MAKERS, _MAKER), (NAMESAKES, _MODEL_OR_NAMESAKE), (ASSISTANTS, _MODEL))
    for entry in entries
    for name in entry.lower().split("|")
}
"""Each known name in lower case, and its symbol."""
_AI_PATTERN = re.compile(_AI_NOUNS, re.IGNORECASE)
_MAKING_PATTERN = re.compile(_MAKING, re.IGNORECASE)
_HELPS = re.compile(rf"{_AI_NOUNS}|\b(?:help|assist|language|models?\b)", re.IGNORECASE)
_ALONE = re.compile(r"[ .!]*$|です|हू|입니다|이고")
_NAME_ONLY = re.compile(rf"(?:{'|'.join(map(re.escape, _KINDS))}|[A-Z][\w.-]{{1,20}}) ?[\d.]*", re.IGNORECASE)
_COMMON_WORDS = set("meta amazon apple opera inflection perplexity cohere upstage stanford berkeley kimi guanaco".split())
_WORD = re.compile(r"[a-z]+")
_NAMES_OF_ONE_WORD = {name for name in _KINDS if _WORD.fullmatch(name) and len(name) > 3}
_TRIGGER_WORDS = frozenset(
    {"gpt", "llm", "ki", "bot", "assistant", "assistent", "asistente", "assistente", "chatbot", "artificial", "artificielle"}
    | {"taalmodel", "sprachmodell", "virtuel", "artificiale", *_NAMES_OF_ONE_WORD}
)
_TRIGGER_PHRASES = [name for name in _KINDS if name.isascii() and name not in _NAMES_OF_ONE_WORD and len(name) > 3] + (
    "language model|modelo de l|modello |bot,|bot "
).split("|")
_TRIGGERS_IN_ANY_SCRIPT = [
    *_TRIGGER_PHRASES,
    *(name for name in _KINDS if not name.isascii()),
    *"modèle de langage|künstliche|модел|интеллект|нейросет|помощник|模型|助手|智能|我是由|我由|，由|了我".split("|"),
    *"モデル|アシスタント|मॉडल|सहायक|एआई|모델|어시스턴트|인공지능|챗봇".split("|"),
]
"""A text without any of these, in lower case, is not looked at. Whole words are found fastest."""
_SPEAKER = re.compile("|".join(_SPEAKERS.values()), re.IGNORECASE)
