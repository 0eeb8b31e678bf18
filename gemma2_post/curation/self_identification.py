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
    r"(?:Chat ?|Instruct)?GPT(?:[- ]?\d[\w.]*\w)?|चैट ?जीपीटी|チャットGPT|챗GPT|챗지피티",
    r"Gemma(?: ?\d)?|जेम्मा|ジェマ|젬마",
    r"PaLM(?: ?2)?|LaMDA",
    r"Qwen[\w.-]*|Tongyi Qianwen|通义千问|千问",
    r"ERNIE(?: ?Bot)?|文心一言|小度",
    r"DeepSeek[\w-]*|深度求索\w{0,2}",
    r"YandexGPT",
    r"GigaChat",
    r"HyperCLOVA ?X?|하이퍼클로바X?",
    r"Kimi|ChatGLM[\w-]*|GLM-\d\w*|Baichuan|百川|InternLM|书生|Doubao|豆包|Hunyuan|混元|讯飞星火|智谱清言|小爱同学|小冰",
    r"Mixtral|Le Chat|StableLM|Tülu|OLMo|Open ?Assistant|HuggingChat|StarChat|Jamba|Replika|YouChat|Cortana|Phi-\d\w*",
    r"WizardLM|Guanaco|OpenChat|Bing Chat|Command R\+?|(?:Microsoft|GitHub) Copilot",
]
"""Names that hardly anybody else has. The names of one entry mean the same: where one is allowed, all are."""
NAMESAKES = [
    r"Claude(?: (?:\d[\d.]*|Instant|Haiku|Sonnet|Opus))*|クロード|클로드|克劳德|क्लॉड",
    r"Bard",
    r"Gemini",
    r"LLaMA(?:[- ]?\d[\d.]*)?",
    r"Alexa",
    r"Алис[аыуе]",
    r"Vicuna|Alpaca|Koala|Dolly|Grok|Copilot|Falcon|Mistral|Siri|Sydney|Orca|Zephyr|Nova|Titan|Granite|Pi|Phi|Yi|Poe",
    r"Luminous|Aria|Bing|Bixby|Маруся",
]
"""Names that people, animals, and things have, too. They count only beside a word such as "assistant", or alone."""
MAKERS = [
    r"Open ?AI|ओपनएआई|オープンAI|오픈 ?AI|오픈에이아이",
    r"Anthropic|アンソロピック|앤트로픽|एंथ्रोपिक",
    r"Google(?: DeepMind| AI| Brain| Research)?|DeepMind|谷歌|グーグル|구글|गूगल|Гугл\w*",
    r"Meta(?: AI)?|Facebook",
    r"Microsoft|微软|マイクロソフト|마이크로소프트|माइक्रोसॉफ्ट|Майкрософт\w*",
    r"Alibaba(?: Cloud)?|阿里(?:巴巴|云)?",
    r"Baidu|百度",
    r"Naver|네이버",
    r"Yandex|Яндекс\w*",
    r"Sber(?:bank)?|Сбер\w*",
    r"Amazon|Apple|IBM|Nvidia|Samsung|삼성|Salesforce|Huawei|华为|Tencent|腾讯|ByteDance|字节跳动|Kakao|카카오|Rakuten|楽天|NTT",
    r"xAI|Mistral AI|Cohere|AI21(?: Labs)?|Inflection(?: AI)?|Aleph Alpha|Opera|Nous Research|Character\.AI|Perplexity",
    r"智谱(?:AI|华章)?|Zhipu(?: AI)?|月之暗面|Moonshot(?: AI)?|科大讯飞|商汤|零一万物|MiniMax|01\.AI",
    r"LMSYS|Large Model Systems|LAION|Databricks|Stability(?: AI)?|EleutherAI|Hugging ?Face|BigScience|Stanford|Berkeley",
    r"Technology Innovation Institute|TII|Allen Institute|AllenAI|AI2|MosaicML|Together AI|Upstage|Maritaca(?: AI)?|Sarvam AI",
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
    r"|开发|训练|研发|创造|设计|打造|制作|创建|推出|构建|開発|訓練|作成|作ら|作っ|作り|設計|トレーニング"
    r"|विकसित|प्रशिक्षित|बनाया|बनाई|निर्मित|डिज़ाइन|개발|훈련|만든|만들|학습시|설계"
)
_MAKER, _MODEL, _AI, _MADE = "\ue000", "\ue001", "\ue002", "\ue003"
"""The symbols, from the private use area of Unicode."""

_END = (
    rf"(?=\s*(?:$|[,.;:!?()，。！？；（）、\"{_AI}{_MADE}{_MAKER}—–-]"
    r"|(?:and|or|but|from|by|here|the|so|version|which|who|an?|your|und|von|ein|eine|et|de|del|un|une|y|e|di|da|pela|een|van|en|на|от|и)\b))"
)
"""What follows a name that stands for itself. Other words make it part of something: "I'm ChatGPT savvy"."""
_ANY = r"(?P<any>(?-i:[A-ZÀ-ÞА-Я][\w&.-]*(?: (?:[A-ZÀ-ÞА-Я&][\w&.-]*|of|de|y|e|et|und|and|en|и)(?![\w]))*))"
"""A name that nobody knows."""

_FORMS = {
    "en": r"""
        I (?:the |an? )?(?:<ai> )?<who>END
        I (?:an?|the|your|one of) (?:[\w-]+ ){0,4}?<who>(?:'s)? (?:[\w.-]+ ){0,3}?(?:<ai>|model|assistant|bot)(?!\w)
        I <who>'s (?:[\w-]+ ){0,4}?(?:<ai>|model|assistant|bot)(?!\w)
        \b(?:my name is|my name's|call me|I go by|I identify as|I'm called|I am called) <who>END
        \bI, <who>,
        \b(?:as|being) (?:an? |the )?(?:[\w-]+ ){0,3}?<who>(?:'s)?(?: (?:[\w.-]+ ){0,3}?(?:<ai>|model|assistant))?, (?:I|my|I'm)\b
        \b(?:I am|I'm|I was|I've been|I have been) (?:\w+ly |also |first )?<made>(?: \w+){0,6}? (?:by|at|from) GAP<who>
        \b(?:I am|I'm|as|being)(?: \w+)? (?:an?|the|your) (?:[\w-]+,? ){0,5}?(?:<ai>|model|assistant|bot),?(?: [\w-]+){0,5}?,? <made>(?: and <made>)? (?:by|at|from) GAP<who>
        \b(?:I am|I'm|as|being)(?: \w+)? (?:an?|the|your) (?:[\w-]+ ){0,4}?<ai>,? (?:from|by|of) <who>
        \b(?:I am|I'm|as|being)(?: \w+)? (?:an?|the|your) (?:[\w-]+ ){0,4}?(?:<ai>|model|assistant|bot),? (?:that |which )?<who>(?: has)? <made>
        \b(?:I am|I'm|as|being)(?: \w+)? (?:an?|the|your) (?:[\w-]+ ){0,4}?<ai>(?: [\w-]+){0,3}?,? <made> by <any>
        <who>,?(?: who| which| that)?(?: \w+){0,2}? <made>(?: and <made>)? me(?=\s*(?:$|[.,;!?]|to\b|for\b|as\b|in\b|on\b|with\b|which\b|and\b))
        <made> me(?:,| is| was|:)* (?:the )?(?:company )?(?:called )?<who>
        \bmy (?:\w+ )?(?:creators?|developers?|makers?|designers?|programmers?|trainers?|builders?|parent company|manufacturer)(?: team)?(?:,| is| are| at| from| of| called| named)* (?:\w+ ){0,3}?<who>
        <who>(?: is|,) my (?:creators?|developers?|makers?|designers?|programmers?|parent company)
        \bI(?: am|'m)?(?: \w+ly)? (?:based on|built on|built upon|<made> on|running on|powered by|run on|derived from) (?:the |a |an )?(?:[\w'-]+ ){0,3}?<model>
        \b(?:I am|I'm|as|being) (?:an? |the |one )?(?:\w+ )?(?:instance|version|variant|iteration|implementation|product|creation) of (?:[\w-]+ ){0,3}?<who>
        \bI (?:belong to|am part of|am a member of) (?:the )?<model>(?: [\w.]+)? (?:family|series|line)
        \byou(?:'re| are) (?:now |currently )?(?:talking|speaking|chatting) (?:to|with) <who>
        \bthis is <who> (?:speaking|here)\b
        I <any>(?:,| and I am| and I'm| -| –) (?:an?|your|the) (?:[\w-]+ ){0,4}?<ai>
        \b(?:my name is|call me|I go by) <any>(?:,| and|, and) (?:I am|I'm) (?:an?|your|the) (?:[\w-]+ ){0,4}?<ai>
        (?:I|\bmy name is|\bI go by) (?P<any>(?-i:[A-Z]\w*(?:Bot|GPT|Chat|LM)))(?!\w|')
    """,
    "de": r"""
        \bich bin (?:nur |eigentlich |lediglich )?(?:eine? |der |die |das )?<who>END
        \b(?:mein Name ist|ich heiße|man nennt mich|hier spricht) <who>END
        \bich bin (?:\w+ )?(?:eine? )?(?:\w+ ){0,3}?<ai>,? (?:\w+ ){0,2}?(?:von|der Firma|aus dem Hause) <who>
        \b(?:ich bin|als) (?:\w+ )?(?:eine? )?(?:\w+ ){0,3}?<ai>,? <made> (?:von|bei|durch) (?:\w+ ){0,4}?<who>
        \b(?:ich bin|als) (?:\w+ )?(?:eine? )?(?:\w+ ){0,3}?<ai>,? (?:das|der|die) (?:\w+ ){0,2}?(?:von|bei|durch) (?:\w+ ){0,4}?<who>(?: \w+){0,3}? <made>
        \bals (?:ein )?von <who> <made> <ai>
        \bals <who> (?:habe|bin|kann|darf|werde|verfüge|besitze|möchte|muss|weiß) ich\b
        \bich (?:wurde |bin )?(?:\w+ ){0,2}?(?:von|bei|durch) (?:\w+ ){0,4}?<who>(?: \w+){0,3}? <made>
        <who> hat mich (?:\w+ ){0,4}?<made>
        \bmeine?n? (?:Entwickler|Schöpfer|Hersteller|Erfinder|Macher|Entwicklungsteam|Ersteller)(?:in)?(?: (?:bei|von|ist|sind|heißt|heißen|der|die|das|Firma)){0,3} <who>
        \bich (?:basiere|beruhe) auf (?:\w+ ){0,3}?<model>
        \bich bin <any>, (?:eine?|Ihre?|deine?|der|das) (?:\w+ ){0,3}?<ai>
        \bich bin eine? (?:\w+ )?<ai>,? (?:das |der |die )?von (?:der )?(?:Firma )?<any> <made>
    """,
    "fr": r"""
        \bje suis (?:\w+ )?(?:l[ae] |une? )?<who>END
        \b(?:je m'appelle|mon nom est|appelez-moi) <who>END
        \ben tant que (?:\w+ ){0,2}?<who>, (?:je\b|j'|mes\b|mon\b|ma\b)
        \b(?:en tant qu(?:e |')|comme |je suis )(?:\w+ )?(?:une? |l[ea] )?(?:\w+ ){0,3}?(?:<ai>|assistante?|modèle),?(?: \w+){0,3}? <made> (?:par|chez) (?:\w+ ){0,4}?<who>
        \bje suis (?:\w+ )?(?:une? |l[ea] )?(?:\w+ ){0,3}?<ai> (?:de |d')<who>
        \bj'ai été (?:\w+ment )?<made>(?: et <made>)? (?:par|chez) (?:\w+ ){0,4}?<who>
        <who>(?: qui)? m'a <made>
        \bm[eo][sn] (?:créa|développ|concep)t?(?:eu|ri)\w+(?: (?:chez|de|est|sont|la|société)){0,3} <who>
        \bje suis (?:basée?|fondée?) sur (?:\w+ ){0,3}?<model>
        \bje suis <any>, (?:une?|votre|ton) (?:\w+ ){0,2}?<ai>
    """,
    "es": r"""
        (?<!no )\bsoy (?:\w+ )?(?:el |la |una? )?<who>END
        \b(?:me llamo|mi nombre es) <who>END
        \bcomo <who>, (?:no )?(?:tengo|puedo|soy|estoy|he|debo|mi|mis|yo)\b
        (?:\bcomo|\bsoy) (?:\w+ )?(?:una? |el |la )?(?:\w+ ){0,2}?(?:<ai>|modelo|asistente),?(?: \w+){0,3}? <made> por (?:\w+ ){0,4}?<who>
        (?<!no )\bsoy (?:\w+ )?(?:una? |el |la )?(?:\w+ ){0,2}?<ai> de <who>
        \b(?:fui|he sido) (?:\w+ )?<made>(?: y <made>)? (?:por|en) (?:\w+ ){0,4}?<who>
        <who> me (?:ha )?<made>
        \bme <made>,? (?:es |fue )?(?:\w+ ){0,2}?<who>
        \bmis? (?:creador|desarrollador|fabricante|diseñador|entrenador)\w*(?: (?:es|son|en|de|la|empresa)){0,3} <who>
        \bestoy basad[oa] en (?:\w+ ){0,3}?<model>
        \bsoy <any>, (?:una?|tu|su) (?:\w+ )?<ai>
    """,
    "it": r"""
        (?:^|[,;:.] ?|\bio |\be )sono (?:\w+ )?(?:il |la |una? )?<who>END
        \b(?:mi chiamo|il mio nome è) <who>END
        \bcome <who>, (?:io |non )?(?:posso|ho|sono|devo|il mio|la mia)\b
        (?:\b(?:in quanto|come)|(?:^|[,;:.] ?|\bio |\be )sono) (?:\w+ )?(?:una? |il |la )?(?:\w+ )?(?:<ai>|modello|assistente),?(?: \w+){0,3}? <made> da (?:\w+ ){0,4}?<who>
        (?:^|[,;:.] ?|\bio |\be )sono (?:\w+ )?una?[ '](?:\w+ )?<ai> di <who>
        (?<!non )\bsono stat[oa] (?:\w+ )?<made>(?: e <made>)? da (?:\w+ ){0,4}?<who>
        <who> mi ha (?:\w+ )?<made>
        \b(?:il mio|i miei|la mia) (?:creator|sviluppator|progettist)\w*(?: (?:di|è|sono|presso|in)){0,2} <who>
        \bsono basat[oa] su (?:\w+ ){0,3}?<model>
        (?:^|[,;:.] ?|\bio )sono <any>, (?:una?|il tuo|il vostro)[ '](?:\w+ )?<ai>
    """,
    "pt": r"""
        (?<!não )\bsou (?:\w+ )?(?:o |a |uma? )?<who>END
        \b(?:meu nome é|chamo-me|me chamo) (?:o |a )?<who>END
        \bcomo (?:o )?<who>, (?:eu |não )?(?:não )?(?:tenho|posso|sou|estou|devo|meu|minha|eu)\b
        \b(?:como|sou) (?:\w+ )?(?:uma? |o |a )?(?:\w+ )?(?:<ai>|modelo|assistente),?(?: \w+){0,3}? <made> (?:pel[ao]|por) (?:\w+ ){0,4}?<who>
        (?<!não )\bsou (?:\w+ )?uma? (?:\w+ )?<ai> d[ao] <who>
        \bfui (?:\w+ )?<made>(?: e <made>)? (?:pel[ao]|por) (?:\w+ ){0,4}?<who>
        <who> me <made>
        \bmeus? (?:criador|desenvolvedor|fabricante)\w*(?: (?:é|são|na|no|da|do|a|o)){0,3} <who>
        \bsou basead[oa] (?:em|no|na) (?:\w+ ){0,3}?<model>
        \bsou (?:o |a )?<any>, (?:uma?|seu|o seu) (?:\w+ )?<ai>
    """,
    "nl": r"""
        \bik ben (?:slechts |maar |eigenlijk )?(?:de |het |een )?<who>END
        \b(?:mijn naam is|ik heet) <who>END
        \b(?:als|ik ben) (?:\w+ )?(?:een )?(?:\w+ )?<ai>,? (?:(?:dat|die) )?(?:<made> )?(?:van|door) <who>
        \bals <who> (?:heb|ben|kan|mag) ik\b
        \bik (?:ben|werd) (?:\w+ )?(?:<made> (?:door|bij) (?:\w+ ){0,3}?<who>|door (?:\w+ ){0,3}?<who> <made>)
        <who> heeft (?:mij|me) (?:\w+ ){0,3}?<made>
        \bmijn (?:maker|ontwikkelaar|schepper)s?(?: (?:bij|van|is|zijn)){0,2} <who>
        \bik ben (?:gebaseerd op|<made> op) (?:\w+ ){0,3}?<model>
        \bik ben <any>, (?:een|je|uw) (?:\w+ )?<ai>
    """,
    "ru": r"""
        \bя(?:\s*[—–-])? (?:это )?(?:модель )?<who>END
        \bменя зовут <who>END
        \bменя <made> (?:компания |команда )?<who>
        <who> меня <made>
        \bя (?:был[аои]? )?<made> (?:компанией |командой |в )?<who>
        \b(?:как|я)(?:\s*[—–-])? (?:\w+ )?<ai>,? <made> (?:компанией |командой |в )?<who>
        \bя(?:\s*[—–-])? (?:\w+ )?<ai> (?:от|компании) <who>
        \bмо[ийя]\w? (?:создател|разработчик)\w*(?: (?:из|в|это|—|–|-|компания)){0,2} <who>
        \bя (?:основан\w*|построен\w*|базируюсь) на (?:модели )?<model>
        \bя(?:\s*[—–-])? <any>, (?:ваш )?(?:\w+ )?<ai>
    """,
    "zh": r"""
        我(?:就|其实|只)?是(?:一个|一款|个|来自)?<who>(?=\s*(?:[，,。.！!、；;（(]|$)|的?(?:一个|一款)?[^，。]{0,4}<ai>|[^，。不]{0,6}<made>)
        我(?:的名字)?(?:叫|名叫|是)做?<who>(?=\s*(?:[，,。.！!、；;（(]|$))
        (?:我|作为)[^。，不]{0,6}(?:由|被)[^。，]{0,6}?<who>[^。，]{0,10}<made>
        作为(?:一个|一款)?<who>[，,的][^。]*我
        <who>(?:公司|团队)?<made>了我
        我的(?:开发者|创造者|开发商|制造商|研发团队|创建者|母公司)(?:是|来自|为)<who>
        我(?:是)?基于<model>
        我(?:是|叫)(?P<any>[^，。、的是]{1,12})，(?:是)?(?:一个|一款|您的|你的)?(?:由[^，。]{1,12}<made>的)?<ai>
        我是?(?:一个|一款)?由(?P<any>[^，。]{1,15}?)(?:公司)?<made>的[^，。]{0,6}<ai>
    """,
    "ja": r"""
        私(?:は|の名前は)、?<who>(?:です|と(?:いう|いい|申し)|であり|で、|$|、|。)
        私は、?[^。、]{0,20}?<who>(?:が|に(?:よって|より)?|で|の)[^。]{0,15}?<made>
        私は、?<who>の[^。]{0,6}<ai>
        ^[^は。]*?<who>(?:が|に(?:よって|より))[^。は]{0,8}<made>(?:した|された|れた|た)[^。は]{0,12}<ai>(?:として|です|なので|である)
        <who>が私を<made>
        私の(?:開発元|開発者|製作者|制作者|作成者|生みの親|開発会社)は、?[^。]{0,8}?<who>
        <who>として、?私
        私は、?<model>を?(?:ベース|基|もと)
        ^(?:私は、?)?(?P<any>[^は、。]{2,20}?)(?:が|によって|により)<made>(?:した|された|れた|た)[^。は]{0,12}<ai>です
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
        मैं (?P<any>[^,।]{2,20}) हू[ँं], [^।]{0,30}<made>[^,।]{0,10}<ai>
        मैं (?P<any>[^,।]{2,20}) द्वारा <made> (?:गया |गई )?(?:एक )?<ai> हू
    """,
    "ko": r"""
        (?:저는|나는|제 이름은) <who>(?:입니다|이고|이며|예요|이에요|라고|,|$)
        (?:저는|나는) [^.]{0,10}?<who>(?:에서|가|이|에 의해|의)? ?[^.]{0,8}?<made>
        ^[^는은]*?<who>(?:에서|가|이) [^.는]{0,8}?<made>[^.는]{0,6}<ai>(?:로서|로써)
        <who>(?:가|이|에서|는) (?:저|나)를 [^.]{0,6}<made>
        (?:저|나)를 <made>[^.]{0,8}<who>
        (?:저는|나는) <who>의? [^.]{0,6}<ai>
    """,
}
"""Forms of self-identification, one a line. <who> is a known assistant or maker, <model> an assistant, <ai> what assistants
call themselves, <made> a verb of making, <any> any name; I, END, and GAP are parts that several English forms share."""
_PARTS = {
    r"\bI ": r"(?<![\w'])I(?: am|'m|m)(?: (?:actually|just|only|simply|in fact|indeed|also|really|currently|still|merely|called|named|known as))* ",
    r"\bGAP": r"\(?(?:(?!(?:who|that|which|when|before|after|because|but|then|to|not|than)\b)[^\s.;!?]+ ){0,9}?\(?",
}
